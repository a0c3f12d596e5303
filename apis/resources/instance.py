"""How an engine's pods look: the part of a pod that users may shape, one type for every workload kind.

Field names and types are Kubernetes' own (core/v1). Deep core types pass through unchecked, with the keys that make no
sense to leave out; the API server checks them when the pod is made.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from apis.resources.base import Int32, Int64, Loose, Model, Quantity, cel

RESERVED_VOLUME = "models"
RESERVED_MOUNT_PATH = "/models"


class Named(Model):
    """A core type known by its name; everything else in it passes through."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})

    name: str


class EnvVar(Named):
    value: str | None = None


class HostAlias(Model):
    ip: str
    hostnames: list[str] = []


class VolumeMount(Named):
    mount_path: str
    sub_path: str | None = None
    read_only: bool | None = None


class Toleration(Model):
    key: str | None = None
    operator: str | None = None
    value: str | None = None
    effect: str | None = None
    toleration_seconds: Int64 | None = None


class TopologySpreadConstraint(Model):
    max_skew: Int32
    topology_key: str
    when_unsatisfiable: str
    label_selector: Loose | None = None
    match_label_keys: list[str] | None = None
    min_domains: Int32 | None = None
    node_affinity_policy: str | None = None
    node_taints_policy: str | None = None


class Probe(Model):
    """What is asked, how often, and how often it may fail."""

    exec: Loose | None = None
    grpc: Loose | None = None
    http_get: Loose | None = None
    tcp_socket: Loose | None = None
    initial_delay_seconds: Int32 | None = None
    period_seconds: Int32 | None = None
    timeout_seconds: Int32 | None = None
    success_threshold: Int32 | None = None
    failure_threshold: Int32 | None = None
    termination_grace_period_seconds: Int64 | None = None


ResourceList: TypeAlias = dict[str, Quantity]


class ResourceRequirements(Model):
    claims: list[Named] | None = None
    limits: ResourceList | None = None
    requests: ResourceList | None = None


StringMap: TypeAlias = dict[str, str]
AtomicMap: TypeAlias = Annotated[dict[str, str], Field(json_schema_extra={"x-kubernetes-map-type": "atomic"})]

# Rules over a list need a bound, or the API server finds them too costly to keep.
_BOUNDED = Field(max_length=1024)

_VOLUME = f"the volume name {RESERVED_VOLUME} is reserved for the model's weights"
_MOUNT = f"the mount path {RESERVED_MOUNT_PATH} is reserved for the model's weights"


_RULES: list[Any] = [
    cel(f"!has(self.volumes) || self.volumes.all(v, v.name != '{RESERVED_VOLUME}')", _VOLUME),
    cel(
        "!has(self.volumeMounts) || self.volumeMounts.all(m, "
        f"m.mountPath != '{RESERVED_MOUNT_PATH}' && m.mountPath != '{RESERVED_MOUNT_PATH}/')",
        _MOUNT,
    ),
]


class ArksInstanceSpec(Model):
    model_config = ConfigDict(json_schema_extra={"x-kubernetes-validations": _RULES})

    labels: StringMap | None = None
    annotations: StringMap | None = None

    env: list[EnvVar] | None = None
    resources: ResourceRequirements | None = None
    volumes: Annotated[list[Named], _BOUNDED] | None = None
    volume_mounts: Annotated[list[VolumeMount], _BOUNDED] | None = None
    init_containers: list[Named] | None = None
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    lifecycle: Loose | None = None
    security_context: Loose | None = None

    pod_security_context: Loose | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    termination_grace_period_seconds: Int64 | None = None
    active_deadline_seconds: Int64 | None = None
    node_name: str | None = None
    node_selector: AtomicMap | None = None
    affinity: Loose | None = None
    tolerations: Annotated[list[Toleration], Field(json_schema_extra={"x-kubernetes-list-type": "atomic"})] | None = (
        None
    )
    topology_spread_constraints: list[TopologySpreadConstraint] | None = None
    scheduler_name: str | None = None
    scheduling_gates: list[Named] | None = None
    resource_claims: list[Named] | None = None
    priority_class_name: str | None = None
    priority: Int32 | None = None
    preemption_policy: str | None = None
    overhead: ResourceList | None = None
    runtime_class_name: str | None = None
    os: Named | None = None
    dns_policy: str | None = None
    dns_config: Loose | None = None
    host_aliases: list[HostAlias] | None = None
    host_network: bool | None = None
    host_pid: bool | None = Field(default=None, alias="hostPID")
    host_ipc: bool | None = Field(default=None, alias="hostIPC")
    host_users: bool | None = None
    share_process_namespace: bool | None = None
    enable_service_links: bool | None = None
    set_hostname_as_fqdn: bool | None = Field(default=None, alias="setHostnameAsFQDN")
    subdomain: str | None = None

    @model_validator(mode="after")
    def _reserved(self) -> "ArksInstanceSpec":
        if any(volume.name == RESERVED_VOLUME for volume in self.volumes or ()):
            raise ValueError(_VOLUME)
        if any(
            mount.mount_path in {RESERVED_MOUNT_PATH, f"{RESERVED_MOUNT_PATH}/"} for mount in self.volume_mounts or ()
        ):
            raise ValueError(_MOUNT)
        return self
