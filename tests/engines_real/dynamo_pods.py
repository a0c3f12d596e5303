"""Dynamo's pods on this machine.

The mocker is Dynamo's own stand-in for an engine on a GPU: the worker's command line stays as it is, but for the name
of the module and of the two options that the mocker calls otherwise; what only a GPU's engine takes is left out.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts import engines
from tests.engines_real import pod_container
from tests.engines_real.pod_container import PodContainer

WORKER, FRONTEND = "leader", "frontend"
"""names of the two containers"""
_MOCKED = {"--model": "--model-path", "--served-model-name": "--model-name"}
_GPU_ONLY = ("--tensor-parallel-size", "--kv-transfer-config")


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


def containers(
    tree: Mapping[str, Any], folder: Path, volumes: Mapping[str, Path], **env: str
) -> dict[str, PodContainer]:
    """Of one pod, by name. `env`: what the image brings."""
    # A pod's processes listen on its own address without a word; here they would find the machine's.
    names = ("DYN_HTTP_HOST", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST")
    own = dict.fromkeys(names, "{address}")
    return pod_container.containers(tree, engines.DYNAMO, folder, volumes, **own, **env)
