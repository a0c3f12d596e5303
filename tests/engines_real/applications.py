"""What a user writes for an engine on LeaderWorkerSets, and the pods that Arks makes of it.

The model and its adapter lie in a volume of their own, in the folders `chat` and `adapter`. Without other resources
given, an instance asks for a GPU.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from apis.resources import KINDS
from controller.reconcile.desired.application import desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.outcome import Desired, World
from controller.workloads.model import GVK, LWS
from tests.engines_real.launched import pod

NAMESPACE = "team-a"
SERVED = "tiny-chat"
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
APPLICATION = """
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: chat, namespace: team-a, uid: chat-uid}
spec:
  replicas: 1
  model: {name: tiny}
  servedModelName: tiny-chat
  instanceSpec:
    resources: {limits: {nvidia.com/gpu: "1"}}
"""
DISAGGREGATED = """
apiVersion: arks.ai/v1
kind: ArksDisaggregatedApplication
metadata: {name: pair, namespace: team-a, uid: pair-uid}
spec:
  model: {name: tiny}
  servedModelName: tiny-chat
  router: {}
  prefill: {instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
  decode: {instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
"""


def application(
    runtime: str, served: frozenset[GVK] = frozenset({LWS}), namespace: str = NAMESPACE, **spec: Any
) -> Desired:
    """`served`: the kinds of the cluster that matter; `spec`: fields beside the usual ones."""
    app, models = _resources(APPLICATION, namespace, {"runtime": runtime, **spec})
    return _unblocked(desired_application(app, models["tiny"], World(served), adapters=models))


def disaggregated(runtime: str, served: frozenset[GVK], namespace: str = NAMESPACE, **spec: Any) -> Desired:
    app, models = _resources(DISAGGREGATED, namespace, {"runtime": runtime, **spec})
    return _unblocked(desired_disaggregated(app, models["tiny"], World(served)))


def _resources(text: str, namespace: str, spec: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the resource with these fields, the models by name)"""
    tree = yaml.safe_load(text)
    tree["spec"] |= spec
    found = []
    for each in (tree, *yaml.safe_load_all(MODELS)):
        each["metadata"]["namespace"] = namespace
        found.append(KINDS[each["kind"]].model_validate(each))
    return found[0], {each.metadata.name: each for each in found[1:]}


def _unblocked(desired: Desired) -> Desired:
    assert desired.blocked is None, desired.problems
    return desired


def leader_pod(desired: Desired, name: str = "chat-0") -> dict[str, Any]:
    """The first pod of the LeaderWorkerSet."""
    (group,) = [item for item in desired.plan.apply if item["kind"] == "LeaderWorkerSet"]
    return pod(group["spec"]["leaderWorkerTemplate"]["leaderTemplate"], name, NAMESPACE)
