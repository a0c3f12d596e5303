"""Defects of Arks in what `kubectl apply` installs: each test is named after its number."""

from __future__ import annotations

import copy
import subprocess
from typing import Any

import pytest

from arks import cli
from arks.options import variable
from controller.engines.images import VARIABLES as IMAGE_VARIABLES
from tests.harness.envoy_gateway import Translation, helm_render, translate
from tests.harness.kubernetes import Object
from tests.manifests.conftest import MANIFESTS
from tests.manifests.translation import judged

CHART = MANIFESTS / "chart"
BODY_LIMIT_BYTES = 50 << 20
READ_ONLY = {"get", "list", "watch"}


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    (found,) = (item for item in objects if item["kind"] == kind and name in ("", item["metadata"]["name"]))
    return found


def containers(objects: list[Object]) -> dict[str, Object]:
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    return {item["name"]: item for item in [*spec.get("initContainers", ()), *spec["containers"]]}


def buffer_bytes(translation: Translation) -> int | None:
    (listener,) = (item for item in translation.listeners if "ready" not in item["name"])
    limit: int | None = listener.get("perConnectionBufferLimitBytes")
    return limit


def test_defect_04_the_policy_that_lets_long_prompts_in_is_about_a_gateway_that_exists(product):
    gateways = {
        (item["metadata"]["namespace"], item["metadata"]["name"]) for item in product if item["kind"] == "Gateway"
    }
    policies = [item for item in product if "targetRefs" in item.get("spec", {})]
    kinds = {item["kind"] for item in policies}
    assert kinds == {"ClientTrafficPolicy", "BackendTrafficPolicy", "EnvoyExtensionPolicy"}
    for item in policies:
        for target in item["spec"]["targetRefs"]:
            assert target["kind"] == "Gateway"
            assert (item["metadata"]["namespace"], target["name"]) in gateways, item["metadata"]["name"]
    assert buffer_bytes(translate(judged(product))) == BODY_LIMIT_BYTES


def test_defect_04_a_misspelt_gateway_would_be_seen(product):
    """What Arks shipped: 32 KiB, and nobody said so."""
    objects = copy.deepcopy(product)
    one(objects, "ClientTrafficPolicy")["spec"]["targetRefs"][0]["name"] = "akrs-eg"
    assert buffer_bytes(translate(judged(objects))) != BODY_LIMIT_BYTES


# --- settings ------------------------------------------------------------------------------------------------------


def flags_of(*commands: str) -> set[str]:
    """The environment variables that these commands' flags have."""
    parser = cli._parser()
    (subcommands,) = (action for action in parser._actions if action.dest == "==SUPPRESS==" and action.choices)
    return {
        variable(flag)
        for name in commands
        for action in subcommands.choices[name]._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }


@pytest.mark.parametrize(("name", "others"), [("extproc", set()), ("controller", IMAGE_VARIABLES)])
def test_defect_19_every_setting_of_the_manifests_is_one_that_the_program_reads(product, name, others):
    """Arks took its Sentinel's name, checked it, and connected without. (A shared store will bring its own test.)"""
    given = {item["name"] for item in containers(product)[name]["env"]}
    ours = {each for each in given if each.startswith("ARKS_")}
    assert ours
    assert ours <= flags_of(name) | others
    assert given - ours <= {"POD_NAME", "POD_NAMESPACE"}
    assert containers(product)[name]["args"] == [name]


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"masterName": "mymaster"}},
        {"extproc": {"redis": {"addrs": ["a:26379"]}}},
        {"extproc": {"state": {"redis": "a:6379"}}},
    ],
)
def test_defect_19_the_chart_refuses_a_setting_that_would_do_nothing(built, values):
    with pytest.raises(subprocess.CalledProcessError) as wrong:
        helm_render(CHART, values)
    assert "redis" in wrong.value.stderr


# --- one of everything, unguarded ----------------------------------------------------------------------------------


def test_defect_27_a_drained_node_takes_no_service_down(product):
    """Envoy has two replicas on different nodes. extproc is one process by design, and may be moved."""
    kubernetes = one(product, "EnvoyProxy")["spec"]["provider"]["kubernetes"]
    assert kubernetes["envoyDeployment"]["replicas"] >= 2
    assert kubernetes["envoyDeployment"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (spread,) = kubernetes["envoyDeployment"]["pod"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert kubernetes["envoyPDB"]["minAvailable"] >= 1
    deployment, budget = one(product, "Deployment"), one(product, "PodDisruptionBudget")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_defect_27_every_container_has_probes_of_its_own_server(product):
    """Arks' plugin had none: traffic came before its caches, and stayed after its death."""
    found = containers(product)
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= found["extproc"].keys()
    assert "livenessProbe" in found["controller"]
    assert found["extproc"]["readinessProbe"]["httpGet"]["path"] == "/readyz"
    for container in found.values():
        ports = {port["name"] for port in container["ports"]}
        for key, probe in container.items():
            if key.endswith("Probe"):
                assert probe["httpGet"]["port"] in ports


def test_defect_27_counters_outlive_the_pod_and_are_open_to_nobody(product):
    """Arks' Redis had no volume and no password."""
    spec = one(product, "Deployment")["spec"]["template"]["spec"]
    volumes = {item["name"]: item for item in spec["volumes"]}
    extproc = containers(product)["extproc"]
    state = next(item["value"] for item in extproc["env"] if item["name"] == "ARKS_STATE")
    (mount,) = (item for item in extproc["volumeMounts"] if item["mountPath"] == state)
    claim = volumes[mount["name"]]["persistentVolumeClaim"]["claimName"]
    assert one(product, "PersistentVolumeClaim", claim)["spec"]["resources"]["requests"]["storage"]
    # It is a folder of one process: no server that others could reach, no second writer.
    assert not [name for name, item in containers(product).items() if "redis" in item["image"] or "redis" in name]
    assert one(product, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert all(
        mount["name"] not in {m["name"] for m in item["volumeMounts"]} for item in [containers(product)["controller"]]
    )


def test_defect_27_nobody_may_more_than_it_does(product):
    """Arks' plugin might write all pods, claims, Services, Gateways and routes of the cluster; it reads three kinds."""
    roles = [item for item in product if item["kind"] in {"ClusterRole", "Role"}]
    assert roles
    for rule in (rule for role in roles for rule in role["rules"]):
        assert "*" not in {*rule["verbs"], *rule["resources"], *rule["apiGroups"]}
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
        if set(rule["resources"]) & {"pods", "nodes", "secrets", "gateways", "arkstokens", "arksquotas"}:
            assert set(rule["verbs"]) <= READ_ONLY, rule
    # extproc asks the API server for nothing: it has no token.
    spec = one(product, "Deployment")["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    mounted = {mount["mountPath"] for mount in containers(product)["extproc"]["volumeMounts"]}
    assert not [path for path in mounted if "serviceaccount" in path]


def test_defect_27_containers_are_confined(product):
    spec = one(product, "Deployment")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    for container in containers(product).values():
        context: dict[str, Any] = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
    assert one(product, "NetworkPolicy", "arks")
