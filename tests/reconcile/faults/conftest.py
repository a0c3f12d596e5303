"""A cluster that may be broken, and controllers on it with no more rights than they are granted."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from controller.permissions import rbac
from tests.harness import kubernetes
from tests.harness.actor import Actor
from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import CONTROLLERS, KubeApi, Object
from tests.harness.rights import grant, until_granted
from tests.harness.tcp_proxy import TcpProxy
from tests.reconcile.conftest import CRDS, STAND_INS, Room, gateway_kinds, wait_for
from tests.reconcile.faults.process import ControllerProcess
from tests.reconcile.faults.world import DEPUTY, Start, World


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    if not session.config.option.collectonly and any("built" in item.fixturenames for item in session.items):
        with contextlib.suppress(NoGoError):  # the tests say so
            kubernetes.binaries()
            kubernetes.controller_manager()


@pytest.fixture(scope="session")
def built() -> None:
    try:
        kubernetes.binaries()
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")


@pytest.fixture(scope="session")
def breakable(built: None) -> Iterator[KubeApi]:
    """A cluster of this folder's own, with the controllers of Kubernetes and a log of every write."""
    with KubeApi(audit=True) as api:
        furnish(api)
        api.start_controllers(CONTROLLERS)  # now, so that they know our kinds at once
        yield api


def furnish(api: KubeApi) -> None:
    """What the controller finds in a cluster: kinds, and its rights."""
    api.apply(CRDS, STAND_INS, *gateway_kinds())
    grant(api)
    api.apply(*_deputy())
    until_granted(api, DEPUTY)


def _deputy() -> Iterator[Object]:
    """The same rights for another user: who wrote what is then seen in the audit log."""
    for each in rbac():
        if each["kind"].endswith("Binding"):
            subject = {"kind": "User", "name": DEPUTY, "apiGroup": "rbac.authorization.k8s.io"}
            yield {**each, "metadata": {**each["metadata"], "name": "deputy"}, "subjects": [subject]}


@pytest.fixture
def hall(breakable: KubeApi) -> Iterator[Room]:
    name = breakable.create_namespace()
    yield Room(breakable, name)
    breakable.remove_namespace(name)


@pytest.fixture
def start(hall: Room, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a controller as that user: with the times that it ships with, where the module says REAL."""
    started: list[ControllerProcess] = []

    def starting(user: str) -> ControllerProcess:
        process = ControllerProcess(hall.api, tmp_path, user=user, real=_real(request))
        started.append(process)
        return process

    yield starting
    for process in started:
        process.end()


def _real(request: pytest.FixtureRequest) -> bool:
    return bool(getattr(request.module, "REAL", False))


@pytest.fixture(scope="module")
def broken_room(breakable: KubeApi) -> Iterator[Room]:
    name = breakable.create_namespace()
    yield Room(breakable, name)
    breakable.remove_namespace(name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(breakable: KubeApi) -> AsyncIterator[TcpProxy]:
    """What lies between the controller and the API server; users and others go past it."""
    async with TcpProxy(breakable.port) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    broken_room: Room, proxy: TcpProxy, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    """One process for all faults of a module, one after the other: it must survive them all."""
    folder = tmp_path_factory.mktemp("controller")
    process = ControllerProcess(broken_room.api, folder, server=proxy.url, real=_real(request))
    try:
        async with Actor(broken_room.api, broken_room.namespace) as actor:
            await wait_for(lambda: process.leads)
            found = World(broken_room, process, actor)
            await found.begin()
            yield found
    finally:
        process.end()
