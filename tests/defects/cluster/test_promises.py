"""What Arks promised and did not do, on a real API server with Kubernetes' own controllers."""

from __future__ import annotations

import pytest

from tests.reconcile.conftest import wait_for
from tests.reconcile.resources import ENDPOINT, SINGLE, STORED_MODEL

AUTOSCALER_TIMEOUT_S = 120.0
"""it looks every 15 s"""

PRIORITY_CLASS = {
    "apiVersion": "scheduling.k8s.io/v1",
    "kind": "PriorityClass",
    "metadata": {"name": "high"},
    "value": 1000,
}


def autoscaler(low: int, high: int):
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "app-qwen"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "arks.ai/v1", "kind": "ArksApplication", "name": "app-qwen"},
            "minReplicas": low,
            "maxReplicas": high,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
                }
            ],
        },
    }


ETCD = [{"name": "ETCD_ENDPOINTS", "value": "http://etcd:2379"}]
GPU = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
COMMANDS = {
    "sglang": (["sglang_router.launch_router", "--pd-disaggregation"], ["sglang", "--disaggregation-mode", "{role}"]),
    "vllm": (["vllm-router", "--vllm-pd-disaggregation"], ["vllm", "serve", "NixlConnector"]),
    "dynamo": (["dynamo.frontend"], ["dynamo.vllm", "--disaggregation-mode", "{role}"]),
}
"""words of the router's command, and of each half's"""


@pytest.mark.slow
async def test_kubernetes_own_autoscaler_scales_an_application(room, running, actor, gateway):
    """Arks' README had autoscaling; no object of its could be scaled."""
    room.apply(STORED_MODEL, SINGLE, ENDPOINT)
    await room.phase("ArksApplication", "app-qwen", "Running")
    room.api.apply({**autoscaler(3, 5), "metadata": {"name": "app-qwen", "namespace": room.namespace}})
    # Nobody serves metrics here, so it moves the replicas between its bounds only; it does so through the same door.
    await wait_for(lambda: room.get("ArksApplication", "app-qwen")["spec"]["replicas"] == 3, AUTOSCALER_TIMEOUT_S)
    app = await room.until("ArksApplication", "app-qwen", lambda app: app["status"].get("readyReplicas") == 3)
    assert app["status"]["phase"] == "Running"
    assert len(room.list("RoleBasedGroup")) == 3

    path = f"{room.api.path('arks.ai/v1', 'ArksApplication', room.namespace)}/app-qwen/scale"
    scale = room.api.request("GET", path)
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (3, 3)
    query = f"{room.api.path('v1', 'Pod', room.namespace)}?labelSelector={scale['status']['selector']}"
    serving = [pod["metadata"]["name"] for pod in room.api.request("GET", query)["items"]]
    assert sorted(serving) == [f"app-qwen-{index}-inference-0" for index in range(3)]

    room.api.apply({**autoscaler(1, 2), "metadata": {"name": "app-qwen", "namespace": room.namespace}})
    await wait_for(lambda: room.get("ArksApplication", "app-qwen")["spec"]["replicas"] == 2, AUTOSCALER_TIMEOUT_S)
    await room.until("ArksApplication", "app-qwen", lambda app: app["status"].get("replicas") == 2)
    await room.until("ArksEndpoint", "qwen-7b", lambda endpoint: endpoint.get("status", {}).get("routes"))


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"kubeScheduling": {"scheduleTimeoutSeconds": 90}}, {"": "true", "-timeout": "90"}),
        (
            {"volcanoScheduling": {"queue": "gpu", "priorityClassName": "high"}},
            {"-volcano-queue": "gpu", "-volcano-priority": "high"},
        ),
    ],
    ids=["kube", "volcano"],
)
async def test_gang_scheduling_reaches_every_replicas_group_and_follows_the_spec(room, running, actor, policy, told):
    """Arks wrote it into a set whose controller handed it to none of its groups."""
    room.api.apply(PRIORITY_CLASS)
    room.apply(STORED_MODEL)
    room.apply(SINGLE, replicas=2, size=2, tensorParallelSize=2, podGroupPolicy=policy)
    await room.phase("ArksApplication", "app-qwen", "Running")
    prefix = "rbg.workloads.x-k8s.io/group-gang-scheduling"

    def gangs() -> list[dict[str, str]]:
        marks = [group["metadata"].get("annotations", {}) for group in room.list("RoleBasedGroup")]
        return [
            {key.removeprefix(prefix): value for key, value in each.items() if key.startswith(prefix)} for each in marks
        ]

    assert gangs() == [gangs()[0]] * 2
    assert told.items() <= gangs()[0].items()
    if "volcanoScheduling" in policy:
        templates = str([group["spec"] for group in room.list("RoleBasedGroup")])
        assert templates.count("'schedulerName': 'volcano'") >= 2
    room.patch("ArksApplication", "app-qwen", {"spec": {"podGroupPolicy": None}})
    await wait_for(lambda: gangs() == [{}, {}])


def pair(runtime: str):
    role = {"instanceSpec": {**GPU, **({"env": ETCD} if runtime == "dynamo" else {})}}
    router = {"instanceSpec": {"env": ETCD}} if runtime == "dynamo" else {}
    spec = {"runtime": runtime, "model": {"name": "qwen-7b"}, "router": router, "prefill": role, "decode": role}
    if runtime == "vllm":
        spec["routerImage"] = "registry.example/vllm-router:1"
    return {
        "apiVersion": "arks.ai/v1",
        "kind": "ArksDisaggregatedApplication",
        "metadata": {"name": "pd"},
        "spec": spec,
    }


@pytest.mark.parametrize("runtime", COMMANDS)
async def test_prefill_and_decode_of_every_runtime_serve_behind_their_router(room, running, actor, gateway, runtime):
    """Arks refused vLLM and Dynamo there."""
    room.apply(STORED_MODEL, pair(runtime), ENDPOINT)
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
    endpoint = await room.until("ArksEndpoint", "qwen-7b", lambda item: item.get("status", {}).get("routes"))
    assert [each["name"] for each in endpoint["status"]["routes"]] == ["arks-application-pd"]

    commands = {}
    for pod in room.list("Pod"):
        role = pod["metadata"]["labels"]["arks.ai/disaggregation-role"]
        main = pod["spec"]["containers"][0]
        commands[role] = [*main.get("command", ()), *main.get("args", ())]
    front, half = COMMANDS[runtime]
    assert commands.keys() == {"router", "prefill", "decode"}
    assert all(word in " ".join(commands["router"]) for word in front), commands["router"]
    for role in ("prefill", "decode"):
        assert all(word.format(role=role) in " ".join(commands[role]) for word in half), commands[role]

    selector = room.get("Service", "arks-application-pd")["spec"]["selector"]
    query = ",".join(f"{key}={value}" for key, value in selector.items())
    found = room.api.request("GET", f"{room.api.path('v1', 'Pod', room.namespace)}?labelSelector={query}")["items"]
    assert [pod["metadata"]["labels"]["arks.ai/disaggregation-role"] for pod in found] == ["router"]
