"""Fixtures of the real Kubernetes API server, shared by every test folder (see `tests/harness/kubernetes.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import KubeApi, binaries

FIXTURES = {"kube_api", "kube_namespace", "own_kube_api"}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    if session.config.option.collectonly:
        return
    if any(FIXTURES & set(getattr(item, "fixturenames", ())) for item in session.items):
        try:
            binaries()
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


@pytest.fixture
def own_kube_api() -> Iterator[KubeApi]:
    """An API server of this test alone, to break."""
    _needs_go()
    with KubeApi() as api:
        yield api
