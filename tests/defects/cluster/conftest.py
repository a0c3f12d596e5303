"""The cluster of `tests/reconcile`, with Kubernetes' own autoscaler among its controllers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import CONTROLLERS, KubeApi, binaries, controller_manager
from tests.reconcile.conftest import CRDS, STAND_INS, actor, gateway, gateway_kinds, room, running

__all__ = ["actor", "gateway", "room", "running"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(here in item.path.parents for item in session.items):
        with contextlib.suppress(NoGoError):  # the tests say so
            build()


def build() -> None:
    binaries()
    controller_manager()


@pytest.fixture(scope="package")
def cluster() -> Iterator[KubeApi]:
    try:
        build()
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")
    with KubeApi(controllers=(*CONTROLLERS, "horizontal-pod-autoscaler-controller")) as api:
        api.apply(CRDS, STAND_INS, *gateway_kinds())
        yield api
