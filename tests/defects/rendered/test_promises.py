"""What Arks' documentation promised of monitoring, and its manifests did not do: checked against the pods we make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.desired.cases import GOLDEN, results
from tests.harness.envoy_gateway import helm_render, kustomize_build
from tests.harness.kubernetes import Object
from tests.manifests.conftest import MANIFESTS

Labels = dict[str, str]
SOURCES = [path for path in sorted(GOLDEN.glob("*.in.yaml")) if not re.search("endpoint|model", path.name)]


@pytest.fixture(scope="module", params=["kustomize", "helm"])
def monitors(request, built) -> dict[str, Object]:
    if request.param == "kustomize":
        found = kustomize_build(MANIFESTS / "monitoring")
    else:
        found = helm_render(MANIFESTS / "chart", {"monitoring": {"enabled": True}})
    return {item["metadata"]["name"]: item for item in found if item["kind"] == "PodMonitor"}


def relabeled(labels: Labels, rules: list[dict[str, Any]]) -> Labels | None:
    """As Prometheus does it. None: dropped."""
    labels = dict(labels)
    for rule in rules:
        value = ";".join(labels.get(name, "") for name in rule["sourceLabels"])
        match = re.fullmatch(rule.get("regex", "(.*)"), value)
        action = rule.get("action", "replace")
        if (action == "keep" and not match) or (action == "drop" and match):
            return None
        if action == "replace" and match:
            labels[rule["targetLabel"]] = match.expand(rule.get("replacement", "$1").replace("$", "\\"))
    return labels


def templates(tree: Any) -> Iterator[Object]:
    """Every pod template in an object."""
    if isinstance(tree, dict):
        if "containers" in tree.get("spec", {}) and "labels" in tree.get("metadata", {}):
            yield tree
        for value in tree.values():
            yield from templates(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from templates(value)


def targets(monitor: Object, pod: Object) -> list[tuple[str, Labels]]:
    """(port's name, labels) of what Prometheus scrapes of a pod."""
    known = pod["metadata"]["labels"]
    selector = monitor["spec"]["selector"]
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "Exists"
        if expression["key"] not in known:
            return []
    found = []
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            labels = {
                "__meta_kubernetes_pod_container_image": container["image"],
                **{f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9]', '_', k)}": v for k, v in known.items()},
            }
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] == port["name"]:
                    made = relabeled(labels, endpoint.get("relabelings", []))
                    found += [] if made is None else [(port["name"], made)]
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name.removesuffix(".in.yaml"))
def test_every_runtime_is_scraped_where_its_metrics_are(monitors, source):
    """Arks' monitor found the Services of plain applications; those of prefill and decode had not the label."""
    pods = [pod for item in results(source)["objects"] for pod in templates(item) if item["kind"] != "Job"]
    assert pods
    for pod in pods:
        labels = pod["metadata"]["labels"]
        role, worker = labels.get("arks.ai/disaggregation-role"), labels.get("arks.ai/work-load-role") == "worker"
        found = targets(monitors["arks-runtimes"], pod)
        dynamo = "dynamo" in pod["spec"]["containers"][0]["image"]
        if role == "router":
            assert [name for name, _ in found] == (["http"] if dynamo else ["metrics"])
        elif dynamo:
            # Frontend and engine are in one pod or in two; either way each container of them is found.
            assert len(found) == len(pod["spec"]["containers"])
        elif not worker:
            assert [name for name, _ in found] == ["http"]
        assert all(each["application"] == labels["arks.ai/application"] for _, each in found)


@pytest.mark.parametrize(
    ("published", "runtime", "name"),
    [
        ("vllm:num_requests_running", "vllm", "num_requests_running"),
        ("vllm:time_to_first_token_seconds_bucket", "vllm", "time_to_first_token_seconds_bucket"),
        ("sglang:num_running_reqs", "sglang", "num_requests_running"),
        ("sglang:num_queue_reqs", "sglang", "num_requests_waiting"),
        ("dynamo_frontend_time_to_first_token_seconds_bucket", "dynamo", "time_to_first_token_seconds_bucket"),
        ("dynamo_component_requests_total", "dynamo", "component_requests_total"),
        ("smg_requests_total", "smg", "requests_total"),
        ("python_gc_objects_collected_total", None, None),
    ],
)
def test_runtimes_metrics_have_one_name_each(monitors, published, runtime, name):
    """The names of Arks' dashboard, whatever engine it is."""
    for endpoint in monitors["arks-runtimes"]["spec"]["podMetricsEndpoints"]:
        made = relabeled({"__name__": published}, endpoint["metricRelabelings"])
        assert (None if made is None else (made["runtime"], made["__name__"])) == (runtime and (runtime, name))
