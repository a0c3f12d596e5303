"""Fixtures of the real Kubernetes API server, shared by every test folder (see `tests/harness/kubernetes.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import CONTROLLERS, KubeApi, binaries, controller_manager

FIXTURES = {"kube_api", "kube_namespace", "own_kube_api", "kube_cluster", "fragile"}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    if session.config.option.collectonly:
        return
    used = FIXTURES & {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if used:
        try:
            binaries()
            if "kube_cluster" in used:
                controller_manager()
        except NoGoError:
            return  # each test that needs it says so


def _needs_go() -> None:
    try:
        binaries()
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")


@pytest.fixture(scope="session")
def kube_api() -> Iterator[KubeApi]:
    """One API server for the whole run. Do not stop, freeze or restart it."""
    _needs_go()
    with KubeApi() as api:
        yield api


@pytest.fixture
def kube_namespace(kube_api: KubeApi) -> Iterator[str]:
    """A fresh namespace on `kube_api`."""
    name = kube_api.create_namespace()
    yield name
    kube_api.remove_namespace(name)


@pytest.fixture(scope="session")
def kube_cluster() -> Iterator[KubeApi]:
    """One API server with the controllers of Kubernetes, for the whole run."""
    _needs_go()
    with KubeApi(controllers=CONTROLLERS) as api:
        yield api


@pytest.fixture
def own_kube_api() -> Iterator[KubeApi]:
    """An API server of this test alone, to break."""
    _needs_go()
    with KubeApi() as api:
        yield api
