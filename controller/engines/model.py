"""The words that engines and workloads share: what is to be launched, and how a container does it.

A :class:`LaunchSpec` is one container's facts; a :class:`Launch` is everything a pod template needs to run
it. A :class:`Problem` says what stands in the way, in terms of the user's own field: a blocking problem
becomes a False condition and nothing is rolled out, any other is a warning beside a running application.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.engines.version import Version, image_version

SERVING_PORT = 8080
MODELS_MOUNT = "/models"


class Role(enum.StrEnum):
    """What one container does inside a serving group."""

    SINGLE = "single"
    LEADER = "leader"
    WORKER = "worker"


class Stage(enum.StrEnum):
    """Which half of a request a group computes."""

    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"


class Accelerator(enum.StrEnum):
    NVIDIA = "nvidia"
    AMD = "amd"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the schema admits and the world does not; ``field`` is the path in the resource."""

    reason: str
    field: str
    message: str
    blocking: bool = True

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, slots=True)
class GroupVariables:
    """Names of the environment variables by which a pod knows its group; each workload API has its own."""

    leader_address: str = "LWS_LEADER_ADDRESS"
    rank: str = "LWS_WORKER_INDEX"
    # Where the rank comes from when the API does not inject the variable by itself on every version.
    rank_label: str | None = "leaderworkerset.sigs.k8s.io/worker-index"


LWS_VARIABLES = GroupVariables()
ROLE_INSTANCE_VARIABLES = GroupVariables("RBG_LWP_LEADER_ADDRESS", "RBG_LWP_WORKER_INDEX", None)


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One container of a serving group. ``args`` are the user's, already split into single arguments."""

    namespace: str
    application: str
    role: Role
    model_path: str
    served_name: str
    image: str
    stage: Stage = Stage.WHOLE
    size: int = 1
    tensor_parallel: int = 0
    pipeline_parallel: int = 0
    args: tuple[str, ...] = ()
    args_field: str = "spec.runtimeCommonArgs"
    accelerator: Accelerator = Accelerator.NVIDIA
    group: GroupVariables = LWS_VARIABLES
    lora: tuple[LoraAdapter, ...] = ()
    grace_s: int | None = None
    env_names: frozenset[str] = frozenset()
    # dynamo.nvidia.com discovery: are DynamoWorkerMetadata objects served by this cluster?
    cluster_discovery: bool = False
    allow_unknown: bool = False

    @property
    def version(self) -> Version | None:
        return image_version(self.image)

    @property
    def headless(self) -> bool:
        return self.role is Role.WORKER


@dataclass(frozen=True, slots=True)
class Probes:
    """Kubernetes probe objects; None where nothing listens that could tell."""

    startup: Mapping[str, Any] | None = None
    readiness: Mapping[str, Any] | None = None
    liveness: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class MetricNames:
    """Prometheus names of the engine's own series; empty where the engine has none."""

    path: str = "/metrics"
    running: str = ""
    waiting: str = ""
    kv_usage: str = ""
    ttft_seconds: str = ""
    itl_seconds: str = ""
    prompt_tokens: str = ""
    generation_tokens: str = ""
    # A cheaper way to the same numbers, where the engine has one.
    loads_path: str | None = None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A second container that the launch needs beside its own."""

    name: str
    command: tuple[str, ...]
    env: tuple[Mapping[str, Any], ...]
    ports: tuple[tuple[str, int], ...]
    probes: Probes
    lifecycle: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """How one container runs. ``command`` is an argument list; ``$(NAME)`` in it is expanded by the kubelet."""

    command: tuple[str, ...]
    env: tuple[Mapping[str, Any], ...] = ()
    ports: tuple[tuple[str, int], ...] = ()
    probes: Probes = field(default_factory=Probes)
    lifecycle: Mapping[str, Any] | None = None
    grace_s: int = 30
    metrics_port: int = SERVING_PORT
    metrics: MetricNames = field(default_factory=MetricNames)
    annotations: Mapping[str, str] = field(default_factory=dict)
    sidecars: tuple[Sidecar, ...] = ()
    # emptyDir volumes that the container and its sidecars share: (name, mount path).
    scratch: tuple[tuple[str, str], ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def serving_port(self) -> int | None:
        """The port that answers requests, None for a container that answers none."""
        own = dict(self.ports).get("http")
        if own is not None:
            return own
        return next((dict(s.ports)["http"] for s in self.sidecars if "http" in dict(s.ports)), None)


def field_env(name: str, path: str) -> dict[str, Any]:
    """An environment variable from the pod's own fields."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def http_probe(path: str, port: int, *, period_s: int, timeout_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }
