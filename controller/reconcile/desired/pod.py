"""One pod template from a launch, an instance spec and the model's storage.

The user's word wins wherever theirs and ours meet: environment by name, probes one by one, lifecycle hooks one
by one. Probes and ports are for containers that serve; a worker has neither, so it can never be taken for one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from apis.resources.base import LocalObjectReference
from apis.resources.instance import ArksInstanceSpec
from controller.engines.model import MODELS_MOUNT, Launch, Probes, Sidecar
from controller.reconcile.desired.metadata import plain
from controller.workloads.model import CONTAINER, Object

# What of an instance spec is a container's or the template's; all the rest is the pod's.
_CONTAINER_KEYS = {
    "labels",
    "annotations",
    "env",
    "resources",
    "volumes",
    "volumeMounts",
    "initContainers",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
    "securityContext",
    "podSecurityContext",
    "terminationGracePeriodSeconds",
}
SHARED_MEMORY_VOLUME = "arks-shm"
SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108 - a mount point inside the container, not a temporary file


@dataclass(frozen=True, slots=True)
class PodInput:
    """``volumes`` and ``mounts`` are the weights'; ``override`` replaces the command, which then comes as the
    environment variable ``override_variable``.
    """

    launch: Launch
    instance: ArksInstanceSpec | None
    image: str
    labels: Mapping[str, str]
    volumes: Sequence[Object] = ()
    mounts: Sequence[Object] = ()
    pull_secrets: Sequence[Object] = ()
    override: Sequence[str] = ()
    override_variable: str = ""
    serves: bool = True
    service_account: str = ""
    shared_memory: bool = True
    annotations: Mapping[str, str] = field(default_factory=dict)


def instance_dict(instance: ArksInstanceSpec | None) -> Object:
    return plain(instance) if instance is not None else {}


def pod_level(instance: Object) -> Object:
    """The fields of an instance spec that are a PodSpec's own."""
    spec = {key: value for key, value in instance.items() if key not in _CONTAINER_KEYS}
    if "podSecurityContext" in instance:
        spec["securityContext"] = instance["podSecurityContext"]
    return spec


def merged_env(ours: Iterable[Mapping[str, object]], theirs: Sequence[Object]) -> list[Object]:
    """Ours first, so that theirs may refer to it. Never one name twice, which server-side apply refuses: of theirs the
    last counts, as in a container.
    """
    kept: Object = {}
    for item in theirs:
        kept.pop(item["name"], None)
        kept[item["name"]] = dict(item)
    return [dict(item) for item in ours if item["name"] not in kept] + list(kept.values())


def pull_secrets(references: Iterable[LocalObjectReference]) -> list[Object]:
    """Each once, for the same reason."""
    return [{"name": name} for name in dict.fromkeys(item.name for item in references)]


def container_ports(ports: Iterable[tuple[str, int]]) -> list[Object]:
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports]


def pod_template(given: PodInput) -> Object:
    instance = instance_dict(given.instance)
    launch = given.launch
    annotations = {**launch.annotations, **given.annotations, **instance.get("annotations", {})}
    volumes = list(given.volumes) + [{"name": name, "emptyDir": {}} for name, _ in launch.scratch]
    mounts = list(given.mounts) + [{"name": name, "mountPath": path} for name, path in launch.scratch]
    if given.shared_memory and not _mounted(instance, SHARED_MEMORY_PATH):
        # Tensor-parallel workers talk through /dev/shm, which is 64 MiB unless somebody mounts more.
        volumes.append({"name": SHARED_MEMORY_VOLUME, "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": SHARED_MEMORY_VOLUME, "mountPath": SHARED_MEMORY_PATH})
    mounts += instance.get("volumeMounts", [])
    spec: Object = {
        # Of a Service named vllm the kubelet would make VLLM_PORT=tcp://..., which vLLM takes for its own and fails on.
        "enableServiceLinks": False,
        **pod_level(instance),
        "terminationGracePeriodSeconds": launch.grace_s,
        "containers": [
            _engine(given, instance, mounts),
            *(_sidecar(item, given.image, instance, launch) for item in launch.sidecars),
        ],
        "volumes": volumes + instance.get("volumes", []),
    }
    if instance.get("initContainers"):
        spec["initContainers"] = instance["initContainers"]
    if given.pull_secrets:
        spec["imagePullSecrets"] = list(given.pull_secrets)
    if given.service_account and "serviceAccountName" not in spec:
        spec["serviceAccountName"] = given.service_account
    metadata: Object = {"labels": {**instance.get("labels", {}), **given.labels}}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def _engine(given: PodInput, instance: Object, mounts: list[Object]) -> Object:
    launch = given.launch
    env = merged_env(launch.env, instance.get("env", []))
    command = list(launch.command)
    if given.override:
        env.append({"name": given.override_variable, "value": shlex.join(command)})
        command = list(given.override)
    container: Object = {
        "name": CONTAINER,
        "image": given.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": env,
        "volumeMounts": mounts,
    }
    if launch.ports:
        container["ports"] = container_ports(launch.ports)
    for key in ("resources", "securityContext"):
        if key in instance:
            container[key] = instance[key]
    lifecycle = {**(launch.lifecycle or {}), **instance.get("lifecycle", {})}
    if lifecycle:
        container["lifecycle"] = lifecycle
    if given.serves:
        container |= _probes(launch.probes, instance)
    return container


def _probes(ours: Probes, instance: Object) -> Object:
    mine = {"startupProbe": ours.startup, "readinessProbe": ours.readiness, "livenessProbe": ours.liveness}
    asked = {key: instance.get(key) or probe for key, probe in mine.items()}
    return {key: dict(probe) for key, probe in asked.items() if probe}


def _sidecar(item: Sidecar, image: str, instance: Object, launch: Launch) -> Object:
    container: Object = {
        "name": item.name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(item.command),
        "env": merged_env(item.env, instance.get("env", [])),
        "ports": container_ports(item.ports),
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in launch.scratch],
        **_probes(item.probes, {}),
    }
    if item.lifecycle:
        container["lifecycle"] = dict(item.lifecycle)
    if "securityContext" in instance:
        container["securityContext"] = instance["securityContext"]
    # It reads the model's tokenizer and configuration, so it sees the weights too.
    container["volumeMounts"].append({"name": "models", "mountPath": MODELS_MOUNT, "readOnly": True})
    return container


def _mounted(instance: Object, path: str) -> bool:
    return any(item.get("mountPath") == path for item in instance.get("volumeMounts", ()))
