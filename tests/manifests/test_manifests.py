"""The manifests as objects: taken strictly by a real API server, in step with each other and with the program."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from arks import cli, options
from tests.harness.envoy_gateway import documents_of, helm_render, kustomize_build
from tests.harness.kubernetes import KubeApi, KubeError, Object
from tests.manifests.conftest import MANIFESTS

CHART = MANIFESTS / "chart"
CLUSTER_WIDE = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "GatewayClass"}


def apply_strictly(api: KubeApi, item: Object, namespace: str = "default") -> Object:
    """Nothing is stored. Raises KubeError for a field that the kind does not have."""
    where = None if item["kind"] in CLUSTER_WIDE else item["metadata"].get("namespace", namespace)
    path = f"{api.path(item['apiVersion'], item['kind'], where)}/{item['metadata']['name']}"
    query = "fieldManager=test&force=true&fieldValidation=Strict&dryRun=All"
    made: Object = api.request("PATCH", f"{path}?{query}", item, content_type="application/apply-patch+yaml")
    return made


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    found = {(item["kind"], item["metadata"]["name"]): item for item in objects}
    assert len(found) == len(objects), "two objects of one kind and name"
    return found


@pytest.fixture(scope="module")
def chart() -> list[Object]:
    return helm_render(CHART)


# --- the API server ------------------------------------------------------------------------------------------------


def test_every_object_is_taken_with_all_of_its_fields(cluster: KubeApi, product: list[Object]):
    for item in [*product, *kustomize_build(MANIFESTS / "monitoring")]:
        apply_strictly(cluster, item)


def test_the_samples_and_examples_are_taken_with_all_of_their_fields(cluster: KubeApi):
    for name in ("team-a", "team-b"):
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    found = documents_of(MANIFESTS / "samples", MANIFESTS / "gateway" / "examples" / "tenants.yaml")
    assert len(found) >= 8
    for item in found:
        apply_strictly(cluster, item)
    (patch,) = documents_of(MANIFESTS / "gateway" / "examples" / "loadbalancer.yaml")
    path = cluster.path("gateway.envoyproxy.io/v1alpha1", "EnvoyProxy", "arks-system") + "/arks"
    query = "fieldValidation=Strict&dryRun=All"
    made = cluster.request("PATCH", f"{path}?{query}", patch, content_type="application/merge-patch+json")
    kubernetes = made["spec"]["provider"]["kubernetes"]
    assert kubernetes["envoyService"]["loadBalancerIP"] == "192.0.2.10"
    assert kubernetes["envoyDeployment"]["replicas"] == 2, "the rest stays"


def test_a_misspelt_field_is_refused(cluster: KubeApi, product: list[Object]):
    """What the tests above rest on."""
    policy = copy.deepcopy(by_name(product)["ClientTrafficPolicy", "arks-eg"])
    policy["spec"]["connection"]["buferLimit"] = "1Mi"
    with pytest.raises(KubeError, match="buferLimit"):
        apply_strictly(cluster, policy)


def pods(objects: list[Object]) -> list[Object]:
    return [item["spec"]["template"] for item in objects if item["kind"] == "Deployment"]


def test_pods_pass_the_restricted_standard_that_their_namespace_enforces(cluster: KubeApi, product: list[Object]):
    (template,) = pods(product)
    path = "/api/v1/namespaces/arks-system/pods?dryRun=All&fieldValidation=Strict"
    cluster.request("POST", path, {**template, "metadata": {**template["metadata"], "name": "arks-0"}})
    loose = copy.deepcopy(template)
    del loose["spec"]["containers"][0]["securityContext"]
    with pytest.raises(KubeError, match="restricted"):
        cluster.request("POST", path, {**loose, "metadata": {"name": "arks-1"}})


def test_each_reference_leads_to_an_object_of_ours(product: list[Object]):
    found = by_name(product)
    deployment, service = found["Deployment", "arks"], found["Service", "arks-extproc"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        found["PodDisruptionBudget", "arks"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy", "arks"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    spec = deployment["spec"]["template"]["spec"]
    assert ("ServiceAccount", spec["serviceAccountName"]) in found
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert [("PersistentVolumeClaim", name) in found for name in claims] == [True]
    containers = [*spec["initContainers"], *spec["containers"]]
    open_ports = {port["containerPort"] for item in containers for port in item["ports"]}
    allowed = {port["port"] for rule in found["NetworkPolicy", "arks"]["spec"]["ingress"] for port in rule["ports"]}
    assert allowed == open_ports
    names = {port["name"] for item in containers for port in item["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    (monitor,) = (
        item
        for item in kustomize_build(MANIFESTS / "monitoring")
        if item["spec"]["selector"].get("matchLabels") == labels
    )
    assert {item["port"] for item in monitor["spec"]["podMetricsEndpoints"]} <= names


def test_only_the_controller_has_the_api_token(product: list[Object]):
    spec = pods(product)[0]["spec"]
    assert spec["automountServiceAccountToken"] is False
    (token,) = (
        volume["name"]
        for volume in spec["volumes"]
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", ()))
    )
    holders = [
        item["name"]
        for item in [*spec["initContainers"], *spec["containers"]]
        if any(mount["name"] == token for mount in item["volumeMounts"])
    ]
    assert holders == ["controller"]


# --- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["extproc", "controller"])
def test_the_command_line_takes_what_the_container_gives_it(product, name, monkeypatch, tmp_path: Path):
    spec = pods(product)[0]["spec"]
    (container,) = (item for item in [*spec["initContainers"], *spec["containers"]] if item["name"] == name)
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], str(variable.get("value", "x")))
    if name == "extproc":
        monkeypatch.setenv("ARKS_STATE", str(tmp_path))
    chosen = cli._parser().parse_args(container["args"])
    admin: options.HostPort = chosen.admin
    probed = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert admin.port == probed[container["livenessProbe"]["httpGet"]["port"]]
    assert admin.host == "0.0.0.0"
    if name == "extproc":
        assert chosen.listen == f"0.0.0.0:{probed['grpc']}"
        assert spec["terminationGracePeriodSeconds"] > chosen.drain_timeout_s
        assert cli.extproc_settings(cli._parser(), chosen).policy_stream == "unix:/run/arks/policy.sock"


def test_controller_and_extproc_meet_at_one_socket_and_state_is_kept(product):
    spec = pods(product)[0]["spec"]
    (controller,), (extproc,) = spec["initContainers"], spec["containers"]
    values = [{item["name"]: item.get("value") for item in each["env"]} for each in (controller, extproc)]
    mounts = [{item["mountPath"]: item["name"] for item in each["volumeMounts"]} for each in (controller, extproc)]
    assert values[0]["ARKS_POLICY_STREAM"] == values[1]["ARKS_POLICY_STREAM"]
    folder = str(Path(values[0]["ARKS_POLICY_STREAM"].removeprefix("unix:")).parent)
    assert mounts[0][folder] == mounts[1][folder]
    volumes = {item["name"]: item for item in spec["volumes"]}
    assert "persistentVolumeClaim" in volumes[mounts[1][values[1]["ARKS_STATE"]]]


# --- the chart -----------------------------------------------------------------------------------------------------


def test_the_chart_is_what_kustomize_makes(product: list[Object], chart: list[Object]):
    ours = by_name(product)
    # `helm install --create-namespace` makes the release's own.
    del ours["Namespace", "arks-system"]
    assert by_name(chart) == ours


def rendered(**values: Any) -> dict[tuple[str, str], Object]:
    return by_name(helm_render(CHART, values, namespace="inference"))


def test_the_charts_monitoring_is_the_manifests(chart: list[Object]):
    more = helm_render(CHART, {"monitoring": {"enabled": True}})
    monitors = by_name([item for item in more if item["kind"] == "PodMonitor"])
    assert monitors == by_name(kustomize_build(MANIFESTS / "monitoring"))
    assert len(more) == len(chart) + len(monitors)


def test_the_charts_values_arrive_and_the_api_server_takes_the_result(cluster: KubeApi):
    for name in ("llm-gateway", "inference"):
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    found = rendered(
        image={"repository": "example.com/arks", "tag": "9.9", "pullPolicy": "Always", "pullSecrets": [{"name": "p"}]},
        gateway={
            "name": "llm",
            "namespace": "llm-gateway",
            "createNamespace": False,
            "className": "llm",
            "listeners": [{"name": "web", "protocol": "HTTP", "port": 8080}],
        },
        envoy={"replicas": 5, "service": {"type": "NodePort", "annotations": {"a/b": "c"}}},
        extproc={
            "drainTimeoutSeconds": 60,
            "state": {"size": "1Gi", "storageClassName": "fast"},
            "env": [{"name": "ARKS_LOG_LEVEL", "value": "debug"}],
        },
        controller={"env": [{"name": "ARKS_DEFAULT_SGLANG_IMAGE", "value": "example.com/sglang"}]},
        networkPolicy={"enabled": False},
        nodeSelector={"disk": "fast"},
        tolerations=[{"key": "only", "operator": "Exists"}],
    )
    for item in found.values():
        if item["kind"] != "CustomResourceDefinition":
            apply_strictly(cluster, item)
    assert ("NetworkPolicy", "arks") not in found
    assert ("Namespace", "llm-gateway") not in found
    spec = found["Deployment", "arks"]["spec"]["template"]["spec"]
    (extproc,), (controller,) = spec["containers"], spec["initContainers"]
    assert {extproc["image"], controller["image"]} == {"example.com/arks:9.9"}
    assert {"name": "ARKS_SCRIPTS_IMAGE", "value": "example.com/arks:9.9"} in controller["env"]
    assert {"name": "ARKS_LOG_LEVEL", "value": "debug"} in extproc["env"]
    assert {"name": "ARKS_DRAIN_TIMEOUT_S", "value": "60"} in extproc["env"]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert found["PersistentVolumeClaim", "arks-state"]["spec"]["storageClassName"] == "fast"
    kubernetes = found["EnvoyProxy", "arks"]["spec"]["provider"]["kubernetes"]
    assert kubernetes["envoyDeployment"]["replicas"] == 5
    assert kubernetes["envoyService"]["type"] == "NodePort"
    for kind in ("ClientTrafficPolicy", "BackendTrafficPolicy", "EnvoyExtensionPolicy"):
        policy = found[kind, "arks-eg"]
        assert policy["metadata"]["namespace"] == "llm-gateway"
        assert policy["spec"]["targetRefs"][0]["name"] == "llm"
    assert found["Gateway", "llm"]["spec"]["gatewayClassName"] == "llm"
    assert found["HTTPRoute", "arks-reserved-router"]["spec"]["parentRefs"][0]["name"] == "llm"
    text = yaml.safe_dump_all(item for key, item in found.items() if key[0] != "CustomResourceDefinition")
    assert "arks-operator-system" not in text
    assert "arks-system" not in text
    assert found["ReferenceGrant", "arks-eg"]["metadata"]["namespace"] == "inference"
    assert found["ClusterRoleBinding", "arks-controller"]["subjects"][0]["namespace"] == "inference"


def test_a_misspelt_value_is_an_error():
    with pytest.raises(subprocess.CalledProcessError) as wrong:
        helm_render(CHART, {"extproc": {"drainTimeoutSecond": 5}})
    assert "drainTimeoutSecond" in wrong.value.stderr
