"""A cluster with our manifests on it: a real API server, the CRDs of the projects that they use, nothing stubbed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.harness import kubernetes
from tests.harness.envoy_gateway import binaries, custom_resources, kustomize_build
from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import CONTROLLERS, KubeApi, Object
from tests.harness.rights import until_granted
from tests.harness.room import NoRoomError
from tests.manifests.platform import Platform
from tests.manifests.tenant import TENANT, Tenant

MANIFESTS = Path(__file__).parents[2] / "manifests"
STAND_INS = Path(__file__).parents[1] / "harness" / "crds"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test: minutes of compiling are no test's time limit."""
    if session.config.option.collectonly or not any(
        Path(__file__).parent in item.path.parents for item in session.items
    ):
        return
    with contextlib.suppress(NoGoError):  # the tests say so
        build()


def build() -> None:
    binaries()
    kubernetes.binaries()
    kubernetes.controller_manager()


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    try:
        build()
    except NoGoError as error:
        pytest.skip(f"Envoy Gateway cannot be built: {error}")


@pytest.fixture(scope="session")
def product(built: None) -> list[Object]:
    """What `kubectl apply -k manifests/` applies."""
    return kustomize_build(MANIFESTS)


@pytest.fixture(scope="session")
def cluster(product: list[Object]) -> Iterator[KubeApi]:
    """Our manifests applied on an API server that knows Envoy Gateway's kinds; nobody acts on them."""
    with KubeApi(controllers=CONTROLLERS) as api:
        for name in ("gateway-api", "envoy-gateway"):
            api.apply(*custom_resources(name))
        monitors = [crd for crd in custom_resources("prometheus") if crd["spec"]["names"]["kind"] == "PodMonitor"]
        api.apply(STAND_INS, *monitors, *product)
        until_granted(api, "controller")
        yield api


@pytest.fixture(scope="package")
def platform(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A cluster with Envoy Gateway and nothing of ours, for all tests here that have traffic."""
    try:
        with Platform(tmp_path_factory.mktemp("platform")) as one:
            yield one
    except NoRoomError as error:
        pytest.skip(f"Envoy Gateway's ports and addresses need namespaces: {error}")


@pytest.fixture(scope="package")
def tenant(platform: Platform, product: list[Object]) -> Tenant:
    """Our manifests applied, and a tenant whose model is served by two engines."""
    platform.install(product)
    found = Tenant(platform, TENANT)
    asyncio.run(found.settle_in())
    return found


@pytest.fixture
async def session(platform: Platform) -> AsyncIterator[aiohttp.ClientSession]:
    async with platform.session() as one:
        yield one
