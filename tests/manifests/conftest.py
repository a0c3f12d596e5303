"""A cluster with our manifests on it: a real API server, the CRDs of the projects that they use, nothing stubbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.envoy_gateway import binaries, custom_resources, kustomize_build
from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import CONTROLLERS, KubeApi, Object, controller_manager

MANIFESTS = Path(__file__).parents[2] / "manifests"
STAND_INS = Path(__file__).parents[1] / "harness" / "crds"


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """The programs, out of the cache or built now: minutes, the first time."""
    try:
        binaries()
        controller_manager()
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
        yield api
