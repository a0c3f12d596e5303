"""The Envoy that Envoy Gateway deploys for our EnvoyProxy: what of it no xDS tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.envoy_gateway import NAMESPACE, EnvoyGateway, documents_of
from tests.harness.kubernetes import KubeApi, Object
from tests.harness.room import NoRoomError
from tests.manifests.conftest import MANIFESTS
from tests.reconcile.conftest import wait_for

OWNED = {
    "gateway.envoyproxy.io/owning-gateway-name": "arks-eg",
    "gateway.envoyproxy.io/owning-gateway-namespace": "arks-operator-system",
}


@pytest.fixture(scope="module")
def deploying(cluster: KubeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    try:
        with EnvoyGateway(cluster, tmp_path_factory.mktemp("eg"), deploys=True):
            yield cluster
    except NoRoomError as error:
        pytest.skip(f"Envoy Gateway's ports need namespaces: {error}")


async def deployed(api: KubeApi, api_version: str, kind: str) -> Object:
    def found() -> Object | None:
        items = api.list(api_version, kind, NAMESPACE)
        return next((item for item in items if OWNED.items() <= item["metadata"]["labels"].items()), None)

    item: Object = await wait_for(found)
    return item


async def test_two_confined_envoys_of_the_proved_version_that_drain_long_enough(deploying):
    spec = (await deployed(deploying, "apps/v1", "Deployment"))["spec"]
    assert spec["replicas"] == 2
    pod = spec["template"]
    # By these the NetworkPolicy and the PodMonitor know them.
    assert OWNED.items() <= pod["metadata"]["labels"].items()
    (envoy,) = (item for item in pod["spec"]["containers"] if item["name"] == "envoy")
    assert envoy["image"] == "envoyproxy/envoy:distroless-v1.40.0"
    assert envoy["securityContext"]["runAsNonRoot"]
    assert envoy["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["terminationGracePeriodSeconds"] > 600
    assert pod["spec"]["automountServiceAccountToken"] is False
    ports = {port["name"]: port["containerPort"] for port in envoy["ports"]}
    assert ports["metrics"] == 19001


async def test_a_drain_of_nodes_leaves_one_envoy(deploying):
    budget = await deployed(deploying, "policy/v1", "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1


async def test_the_load_balancer_is_as_the_example_says(deploying):
    service = await deployed(deploying, "v1", "Service")
    assert (service["spec"]["type"], service["spec"]["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(80, 10080)]
    path = deploying.path("gateway.envoyproxy.io/v1alpha1", "EnvoyProxy", "arks-system") + "/arks"
    (patch,) = documents_of(MANIFESTS / "gateway" / "examples" / "loadbalancer.yaml")
    deploying.request("PATCH", path, patch, content_type="application/merge-patch+json")

    def changed() -> bool:
        found = deploying.get("v1", "Service", service["metadata"]["name"], NAMESPACE)
        wanted = patch["spec"]["provider"]["kubernetes"]["envoyService"]
        annotations = found["metadata"].get("annotations", {})
        return (
            found["spec"].get("loadBalancerIP") == wanted["loadBalancerIP"]
            and found["spec"].get("loadBalancerSourceRanges") == wanted["loadBalancerSourceRanges"]
            and wanted["annotations"].items() <= annotations.items()
        )

    await wait_for(changed)
