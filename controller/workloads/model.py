"""What is to be served, what was found, and what shall be done about it; plain data between three rooms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from controller.engines.model import GroupVariables, Problem

Object = dict[str, Any]

APPLICATION_LABEL = "arks.ai/application"
MODEL_LABEL = "arks.ai/model"
ROLE_LABEL = "arks.ai/work-load-role"
STAGE_LABEL = "arks.ai/disaggregation-role"
TEMPLATE_HASH = "arks.ai/template-hash"
WORKER_INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"


class GVK(NamedTuple):
    """One served kind; discovery yields a set of these."""

    group: str
    version: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


DEPLOYMENT = GVK("apps", "v1", "Deployment")
LWS = GVK("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet")
RBG_V1ALPHA1 = GVK("workloads.x-k8s.io", "v1alpha1", "RoleBasedGroup")
RBG_V1ALPHA2 = GVK("workloads.x-k8s.io", "v1alpha2", "RoleBasedGroup")
RBGS_V1ALPHA1 = GVK("workloads.x-k8s.io", "v1alpha1", "RoleBasedGroupSet")
RBGS_V1ALPHA2 = GVK("workloads.x-k8s.io", "v1alpha2", "RoleBasedGroupSet")
DYNAMO_METADATA = GVK("nvidia.com", "v1alpha1", "DynamoWorkerMetadata")


class Gang(NamedTuple):
    """``podGroupPolicy``: exactly one scheduler, told apart by ``scheduler``."""

    scheduler: Literal["kube", "volcano"]
    timeout_s: int = 60
    priority_class: str = ""
    queue: str = ""


class Surge(NamedTuple):
    """How many replicas may be missing, or too many, during a change: numbers or percentages of the replicas."""

    max_unavailable: int | str
    max_surge: int | str
    partition: int = 0

    def counted(self, replicas: int) -> tuple[int, int]:
        """(unavailable, surge) as numbers, rounded as Kubernetes rounds; never both zero."""
        unavailable = _share(self.max_unavailable, replicas, up=False)
        extra = _share(self.max_surge, replicas, up=True)
        return (unavailable or 1, 0) if unavailable == extra == 0 else (unavailable, extra)


def _share(value: int | str, replicas: int, *, up: bool) -> int:
    if isinstance(value, int):
        return value
    percent = int(value.removesuffix("%")) * replicas
    return -(-percent // 100) if up else percent // 100


def default_surge(replicas: int) -> Surge:
    """A single replica is replaced by starting its successor first, several go one by one: a rollout never
    takes the last one down. Where no second GPU is free, the successor waits and the old one serves on.
    """
    return Surge(0, 1) if replicas == 1 else Surge(1, 0)


@dataclass(frozen=True, slots=True)
class RoleGroup:
    """One role: ``replicas`` groups of ``size`` pods. ``leader`` and ``worker`` are pod templates whose single
    engine container is named ``CONTAINER``; each workload renames it as Arks named it there.
    """

    name: str
    replicas: int
    size: int
    leader: Object
    worker: Object | None = None
    rolling: Surge | None = None

    @property
    def surge(self) -> Surge:
        return self.rolling or default_surge(self.replicas)


CONTAINER = "engine"


@dataclass(frozen=True, slots=True)
class Serving:
    """One application's groups. ``owner`` is the controller reference that every object carries."""

    namespace: str
    name: str
    owner: Object
    labels: Mapping[str, str]
    roles: tuple[RoleGroup, ...]
    disaggregated: bool = False
    gang: Gang | None = None

    def role(self, name: str) -> RoleGroup:
        return next(role for role in self.roles if role.name == name)


@dataclass(frozen=True, slots=True)
class Observed:
    """What the cluster holds for one application: workload objects of any kind, and its pods."""

    objects: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()

    def find(self, kind: str, name: str) -> Object | None:
        found = (item for item in self.objects if item["kind"] == kind and item["metadata"]["name"] == name)
        return next(found, None)


class Deletion(NamedTuple):
    api_version: str
    kind: str
    namespace: str
    name: str
    propagation: Literal["Background", "Orphan"] = "Background"


@dataclass(frozen=True, slots=True)
class Plan:
    """``apply`` server-side; ``delete`` what exists and must go. What is in neither stays as it is: a plan is
    one step, and the next change of the cluster leads to the next one.
    """

    apply: tuple[Object, ...] = ()
    delete: tuple[Deletion, ...] = ()
    problems: tuple[Problem, ...] = ()
    rolling: bool = False


class Counts(NamedTuple):
    replicas: int = 0
    ready: int = 0
    updated: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(self.replicas + other.replicas, self.ready + other.ready, self.updated + other.updated)


class Workload(Protocol):
    """One API. ``kinds`` are what its objects are, for watches; ``variables`` how a pod knows its group."""

    name: Literal["lws", "rbg", "deployment"]
    kinds: tuple[GVK, ...]
    variables: GroupVariables

    def build(self, serving: Serving, observed: Observed) -> Plan: ...

    def status(self, serving: Serving, observed: Observed) -> Mapping[str, Counts]:
        """Counts by role name, over all groups of the role."""
        ...


def metadata(serving: Serving, name: str, annotations: Mapping[str, str] | None = None) -> Object:
    found: Object = {
        "name": name,
        "namespace": serving.namespace,
        "labels": dict(serving.labels),
        "ownerReferences": [dict(serving.owner)],
    }
    if annotations:
        found["annotations"] = dict(annotations)
    return found


def renamed(template: Object, container: str) -> Object:
    """A pod template with its engine container under the name that this API's pods have always had."""
    spec = dict(template["spec"])
    spec["containers"] = [
        {**item, "name": container} if item["name"] == CONTAINER else item for item in spec["containers"]
    ]
    return {**template, "spec": spec}


def template_hash(tree: object) -> str:
    """A short, stable name for the content of a template; fit for a label."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def is_ready(pod: Object) -> bool:
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions: Iterable[Object] = (pod.get("status") or {}).get("conditions") or ()
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def pods_serving(pods: Iterable[Object]) -> Mapping[str, Counts]:
    """Counts by role from leader pods alone, for an application whose newest spec cannot be built.

    Roles are named as workloads name them; nothing is ``updated``.
    """
    counts: dict[str, Counts] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels") or {}
        stage = labels.get(STAGE_LABEL, "")
        leads = labels.get(ROLE_LABEL) == "leader" and labels.get(WORKER_INDEX_LABEL, "0") == "0"
        if pod["metadata"].get("deletionTimestamp") or not (leads or stage == "router"):
            continue
        role = {"": "inference", "router": "scheduler"}.get(stage, stage)
        counts[role] = counts.get(role, Counts()).plus(Counts(1, int(is_ready(pod)), 0))
    return counts


def int_of(tree: Mapping[str, Any] | None, key: str) -> int:
    return int((tree or {}).get(key) or 0)


def up_to_date(item: Object) -> bool:
    """Has the API's controller seen the newest spec? If not, its counts are about an older one."""
    generation = int_of(item["metadata"], "generation")
    return int_of(item.get("status"), "observedGeneration") >= generation
