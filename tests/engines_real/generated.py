"""What a user of a cluster of CPUs writes, and the pods that Arks makes of it.

The engine's settings for CPUs stand where a user gives them: in the instance's `env` and in `runtimeCommonArgs`. That
resources name processors and memory and no device is what makes it a CPU deployment.
"""

from typing import Any

import yaml

from apis.resources import KINDS
from controller.reconcile.desired.application import desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.outcome import Desired, World
from controller.workloads.model import GVK, WORKER_INDEX_LABEL
from tests.engines_real.launched import pod

NOTHING_ELSE_INSTALLED: frozenset[GVK] = frozenset()

MODELS = """
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: tiny, namespace: team-a, uid: tiny-uid}
spec:
  model: arks/tiny
  source: {pvc: {claimName: weights, subPath: chat}}
status: {phase: Ready}
---
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: accent, namespace: team-a, uid: accent-uid}
spec:
  model: arks/accent
  source: {pvc: {claimName: weights, subPath: adapter}}
status: {phase: Ready}
"""

# Processes that need not import everything anew; no compiling; one computing thread, where the kernel puts it.
INSTANCE = """
resources: {requests: {cpu: "1", memory: 4Gi}, limits: {memory: 6Gi}}
env:
  - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
  - {name: VLLM_CPU_KVCACHE_SPACE, value: "1"}
  - {name: VLLM_CPU_OMP_THREADS_BIND, value: nobind}
  - {name: OMP_NUM_THREADS, value: "1"}
  - {name: VLLM_WORKER_MULTIPROC_METHOD, value: fork}
  - {name: TORCHDYNAMO_DISABLE, value: "1"}
"""

APPLICATION = """
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: chat, namespace: team-a, uid: chat-uid}
spec:
  replicas: 1
  runtime: vllm
  model: {name: tiny}
  servedModelName: tiny-chat
  runtimeCommonArgs: ["--host $POD_IP", --enforce-eager, "--block-size 32"]
"""

# In bfloat16 and on processors with AMX, vLLM 0.32 dies of an illegal instruction when the first thing that it computes
# is a single token; and that is what a decode engine's first request is.
DISAGGREGATED = """
apiVersion: arks.ai/v1
kind: ArksDisaggregatedApplication
metadata: {name: pair, namespace: team-a, uid: pair-uid}
spec:
  runtime: vllm
  routerImage: registry.example/vllm-router:v0.1.17
  model: {name: tiny}
  servedModelName: tiny-chat
  router:
    routerArgs: ["--host $POD_IP", "--prometheus-host $POD_IP"]
    instanceSpec:
      env: [{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
  prefill: {runtimeCommonArgs: ["--host $POD_IP", --enforce-eager, "--block-size 32", "--dtype float32"]}
  decode: {runtimeCommonArgs: ["--host $POD_IP", --enforce-eager, "--block-size 32", "--dtype float32"]}
"""


def _models() -> dict[str, Any]:
    found = [KINDS[tree["kind"]].model_validate(tree) for tree in yaml.safe_load_all(MODELS)]
    return {each.metadata.name: each for each in found}


def instance(*env: dict[str, str]) -> dict[str, Any]:
    """The instance of one engine on CPUs, with more variables."""
    tree: dict[str, Any] = yaml.safe_load(INSTANCE)
    tree["env"] += env
    return tree


def application(
    *args: str,
    served: frozenset[GVK] = NOTHING_ELSE_INSTALLED,
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> Desired:
    """`args` come after the usual `runtimeCommonArgs`; what is wrong with it is in the result's `blocked`."""
    tree = yaml.safe_load(APPLICATION)
    tree["metadata"]["annotations"] = annotations or {}
    tree["spec"] |= {"instanceSpec": instance(), **spec}
    tree["spec"]["runtimeCommonArgs"] += args
    models = _models()
    app = KINDS[tree["kind"]].model_validate(tree)
    return desired_application(app, models["tiny"], World(served), adapters=models)


def disaggregated(*env: dict[str, str], namespace: str = "team-a") -> Desired:
    """`env` goes to both engines."""
    tree = yaml.safe_load(DISAGGREGATED)
    tree["metadata"]["namespace"] = namespace
    for stage in ("prefill", "decode"):
        tree["spec"][stage]["instanceSpec"] = instance(*env)
    found = desired_disaggregated(
        KINDS[tree["kind"]].model_validate(tree), _models()["tiny"], World(NOTHING_ELSE_INSTALLED)
    )
    assert found.blocked is None, found.problems
    return found


def pods(desired: Desired) -> dict[str, dict[str, Any]]:
    """One pod of each template: of a Deployment by its name, of a LeaderWorkerSet's group `leader` and `worker`."""
    found = {}
    for item in desired.plan.apply:
        name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
        if item["kind"] == "Deployment":
            found[name] = pod(item["spec"]["template"], f"{name}-0", namespace)
        elif item["kind"] == "LeaderWorkerSet":
            group = item["spec"]["leaderWorkerTemplate"]
            found["leader"] = pod(_ranked(group["leaderTemplate"], 0), f"{name}-0", namespace)
            found["worker"] = pod(_ranked(group["workerTemplate"], 1), f"{name}-0-1", namespace)
    return found


def _ranked(template: dict[str, Any], rank: int) -> dict[str, Any]:
    """With the label that LeaderWorkerSet's controller puts on each pod of a group."""
    labels = {**template["metadata"].get("labels", {}), WORKER_INDEX_LABEL: str(rank)}
    return {**template, "metadata": {**template["metadata"], "labels": labels}}
