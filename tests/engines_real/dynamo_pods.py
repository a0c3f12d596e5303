"""Dynamo's pods: what a user writes, what Arks makes of it, and how it runs on this machine.

A pod's containers share an address here as they do on a node. A program that listens on every address of its pod, or
asks its own pod by 127.0.0.1, means that one address.

The mocker is Dynamo's own stand-in for an engine on a GPU: the worker's command line stays as it is, but for the name
of the module and of the two options that the mocker calls otherwise; what only a GPU's engine takes is left out.
"""

import contextlib
import copy
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from apis.resources import KINDS
from controller.reconcile.desired.application import desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.outcome import Desired, World
from controller.workloads.model import GVK, LWS
from scripts import engines
from tests.engines_real.launched import START_TIMEOUT_S, Container, pod, pod_address

NAMESPACE = "team-a"
SERVED = "tiny-chat"
WORKER, FRONTEND = "leader", "frontend"
"""names of the two containers"""

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
  runtime: dynamo
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
  runtime: dynamo
  model: {name: tiny}
  servedModelName: tiny-chat
  router: {}
  prefill: {instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
  decode: {instanceSpec: {resources: {limits: {nvidia.com/gpu: "1"}}}}
"""
_MOCKED = {"--model": "--model-path", "--served-model-name": "--model-name"}
_GPU_ONLY = ("--tensor-parallel-size", "--kv-transfer-config")


def application(served: frozenset[GVK] = frozenset({LWS}), namespace: str = NAMESPACE, **spec: Any) -> Desired:
    app, models = _resources(APPLICATION, namespace, spec)
    return _unblocked(desired_application(app, models["tiny"], World(served), adapters=models))


def disaggregated(served: frozenset[GVK], namespace: str = NAMESPACE, **spec: Any) -> Desired:
    app, models = _resources(DISAGGREGATED, namespace, spec)
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


def mocked(tree: Mapping[str, Any], *options: str) -> dict[str, Any]:
    """The same pod with the mocker for an engine; `options` are the mocker's own."""
    found = copy.deepcopy(dict(tree))
    worker = next((each for each in found["spec"]["containers"] if "dynamo.vllm" in each["command"]), None)
    if worker is None:
        return found
    command = iter(worker["command"])
    kept: list[str] = []
    for part in command:
        if part in _GPU_ONLY:
            next(command)
        else:
            kept.append("dynamo.mocker" if part == "dynamo.vllm" else _MOCKED.get(part, part))
    worker["command"] = [*kept, *options]
    return found


class PodContainer(Container):
    """A container that reaches all of its pod, and nothing beside it, at the pod's one address."""

    def _placed(self, text: str) -> str:
        text = super()._placed(text).replace("127.0.0.1", self.address).replace("0.0.0.0", self.address)
        for mount in self.spec["volumeMounts"]:
            if mount["name"] in self.volumes:
                where = self.volumes[mount["name"]] / mount.get("subPath", "")
                text = text.replace(f"file://{mount['mountPath']}", f"file://{where}")
        return text

    def post_start(self) -> int:
        """The hook that comes before any probe; its exit status."""
        return self._exec(self.spec["lifecycle"]["postStart"]["exec"]["command"], START_TIMEOUT_S)

    def stop(self) -> int:
        """As a deleted pod's container ends: hook, SIGTERM, SIGKILL at the end of the grace period."""
        until_s = time.monotonic() + self.grace_s
        self.pre_stop()
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait_ended(max(2.0, until_s - time.monotonic()))
        self.kill()
        return self.wait_ended(10)


def containers(
    tree: Mapping[str, Any], folder: Path, volumes: Mapping[str, Path], env: Mapping[str, str] | None = None
) -> dict[str, PodContainer]:
    """Of one pod, by name. `env`: what the image brings beside what every image here brings."""
    address = pod_address()
    image = {
        "PATH": f"{engines.environment(engines.DYNAMO)}/bin:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        # A pod's processes listen on its own address without a word; here they would find the machine's.
        **dict.fromkeys(("DYN_HTTP_HOST", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"), address),
        "DYN_EVENT_PLANE_HOST": address,
        **(env or {}),
    }
    return {
        each["name"]: PodContainer(tree, folder / each["name"], volumes, {}, image, each["name"], address)
        for each in tree["spec"]["containers"]
    }
