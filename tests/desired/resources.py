"""Resources for tests, read from YAML as a user writes it."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from apis.resources import KINDS

MODEL = """
apiVersion: arks.ai/v1
kind: ArksModel
metadata: {name: qwen-7b, namespace: team-a, uid: model-uid}
spec:
  model: Qwen/Qwen2.5-7B-Instruct-1M
  source: {huggingface: {}}
  storage:
    pvc:
      name: qwen-claim
      spec:
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 20Gi}}
status: {phase: Ready}
"""

APPLICATION = """
apiVersion: arks.ai/v1
kind: ArksApplication
metadata: {name: app-qwen, namespace: team-a, uid: app-uid}
spec:
  replicas: 1
  size: 1
  model: {name: qwen-7b}
  instanceSpec:
    resources:
      limits: {nvidia.com/gpu: "1"}
"""

DISAGGREGATED = """
apiVersion: arks.ai/v1
kind: ArksDisaggregatedApplication
metadata: {name: pd, namespace: team-a, uid: pd-uid}
spec:
  model: {name: qwen-7b}
  servedModelName: qwen
  router: {}
  prefill: {instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
  decode: {replicas: 2, instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
"""

ENDPOINT = """
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata: {name: qwen-7b, namespace: team-a, uid: endpoint-uid}
spec:
  defaultWeight: 5
  gatewayRef: {name: arks-eg, namespace: arks-operator-system}
"""


def parse(tree: dict[str, Any]) -> Any:
    return KINDS[tree["kind"]].model_validate(tree)


def load(text: str, **changes: Any) -> Any:
    """A resource from YAML; keyword arguments are merged into its spec, ``None`` removes a key."""
    tree = yaml.safe_load(text)
    _merge(tree.setdefault("spec", {}), changes)
    return parse(tree)


def annotated(text: str, annotations: dict[str, str], **changes: Any) -> Any:
    tree = yaml.safe_load(text)
    tree["metadata"]["annotations"] = annotations
    _merge(tree["spec"], changes)
    return parse(tree)


def with_status(text: str, status: dict[str, Any], **changes: Any) -> Any:
    tree = yaml.safe_load(text)
    tree["status"] = status
    _merge(tree["spec"], changes)
    return parse(tree)


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def container(template: dict[str, Any]) -> dict[str, Any]:
    return template["spec"]["containers"][0]
