"""RoleBasedGroup, v1alpha1 (as Arks pins it, 0.5.0-alpha.4) and v1alpha2 (0.7 and later).

We create RoleBasedGroups ourselves, under the names that Arks' RoleBasedGroupSet gave them (``<app>-<index>``):
the set changes all its children at once and hands ``podGroupPolicy`` to none of them. An application's replicas
are groups of their own, so gang scheduling is per replica and :mod:`controller.workloads.rollout` rolls them; a
disaggregated application is one group of three roles, each rolled by its own workload. A set that Arks left is
deleted without its children, which are then adopted one by one: nothing stops serving.

Inside a group a role is a base template with two patches. The base is the worker's, so that whatever only a
leader may have (probes, ports, the leader label) cannot leak into workers. v1alpha1 leaves ``updatedReplicas`` at
zero for LWS roles and its counts lag one step behind a change, so pods and their template hash are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

from controller.engines.model import LWS_VARIABLES, ROLE_INSTANCE_VARIABLES, GroupVariables
from controller.workloads.lws import ROUTER_ROLE, with_scheduler
from controller.workloads.model import (
    DEPLOYMENT,
    GVK,
    LWS,
    RBG_V1ALPHA1,
    RBG_V1ALPHA2,
    RBGS_V1ALPHA1,
    RBGS_V1ALPHA2,
    ROLE_LABEL,
    STAGE_LABEL,
    TEMPLATE_HASH,
    WORKER_INDEX_LABEL,
    Counts,
    Deletion,
    Gang,
    Object,
    Observed,
    Plan,
    RoleGroup,
    Serving,
    Surge,
    is_ready,
    metadata,
    renamed,
    template_hash,
)
from controller.workloads.rollout import Group, step

WORKLOAD_TYPE = "rbg.workloads.x-k8s.io/role-workload-type"
GROUP_LABELS = ("rbg.workloads.x-k8s.io/group-name", "rolebasedgroup.workloads.x-k8s.io/name")
_GANG = "rbg.workloads.x-k8s.io/group-gang-scheduling"


def patches(leader: Object, worker: Object) -> tuple[Object, Object, Object]:
    """(base, leader's patch, worker's patch) as strategic merge patches.

    The worker's patch repeats its command: an object that Arks made holds its old worker command there, in a
    field without schema, and server-side apply would leave it standing.
    """
    base = copy.deepcopy(worker)
    command = {
        "spec": {
            "containers": [
                {"name": item["name"], "command": item["command"]} for item in worker["spec"]["containers"][:1]
            ]
        }
    }
    return base, copy.deepcopy(leader), command


def _rollout(rolling: Surge) -> Object:
    return {
        "type": "RollingUpdate",
        "rollingUpdate": {
            "maxUnavailable": rolling.max_unavailable,
            "maxSurge": rolling.max_surge,
            "partition": rolling.partition,
        },
    }


class RbgWorkload:
    name: Literal["lws", "rbg", "deployment"] = "rbg"

    def __init__(self, api: GVK, *, lws: bool = True) -> None:
        """``lws``: run multi-pod roles as LeaderWorkerSets; without it, as v1alpha2's own RoleInstanceSets."""
        self._api = api
        self._lws = lws
        self.kinds: tuple[GVK, ...] = (api, RBGS_V1ALPHA2 if api == RBG_V1ALPHA2 else RBGS_V1ALPHA1)
        self.variables: GroupVariables = LWS_VARIABLES if lws else ROLE_INSTANCE_VARIABLES

    def build(self, serving: Serving, observed: Observed) -> Plan:
        inherited = observed.find("RoleBasedGroupSet", serving.name)
        if inherited is not None:
            # Its children keep it as their controller until it is gone; adopting them comes after.
            if inherited["metadata"].get("deletionTimestamp"):
                return Plan(rolling=True)
            gone = Deletion(
                inherited["apiVersion"], inherited["kind"], serving.namespace, serving.name, propagation="Orphan"
            )
            return Plan(delete=(gone,), rolling=True)
        if serving.disaggregated:
            extra = [item for index, item in self._existing(serving, observed).items() if index > 0]
            return Plan((self.group(serving, 0),), tuple(self._deletion(serving, item) for item in extra))
        return self._replicas(serving, observed)

    def status(self, serving: Serving, observed: Observed) -> Mapping[str, Counts]:
        counts: dict[str, Counts] = {}
        for role in serving.roles:
            wanted = self._hash(serving, role)
            pods = [pod for pod in observed.pods if self._is_leader_of(serving, role, pod)]
            updated = [pod for pod in pods if (pod["metadata"].get("annotations") or {}).get(TEMPLATE_HASH) == wanted]
            counts[role.name] = Counts(len(pods), sum(map(is_ready, pods)), len(updated))
        return counts

    def group(self, serving: Serving, index: int) -> Object:
        """One RoleBasedGroup, marked with the hash of everything that its pods depend on."""
        roles = [self._role(serving, role) for role in serving.roles]
        annotations = {TEMPLATE_HASH: template_hash(roles)}
        spec: Object = {"roles": roles}
        if serving.gang is not None:
            if self._api == RBG_V1ALPHA2:
                annotations |= _gang_annotations(serving.gang)
            else:
                spec["podGroupPolicy"] = _gang_policy(serving.gang)
        return {
            "apiVersion": self._api.api_version,
            "kind": self._api.kind,
            "metadata": metadata(serving, f"{serving.name}-{index}", annotations),
            "spec": spec,
        }

    def _replicas(self, serving: Serving, observed: Observed) -> Plan:
        role = serving.roles[0]
        existing = self._existing(serving, observed)
        wanted = self.group(serving, 0)["metadata"]["annotations"][TEMPLATE_HASH]
        serves = {self._group_of(pod): pod for pod in observed.pods if self._serves(serving, role, pod)}
        groups = {}
        for index, item in existing.items():
            name = item["metadata"]["name"]
            updated = (item["metadata"].get("annotations") or {}).get(TEMPLATE_HASH) == wanted
            pod = serves.get(name)
            # A pod of the old template still runs for a moment after its group was changed: it is leaving.
            stale = pod is not None and updated and self._pod_hash(pod) != self._hash(serving, role)
            groups[index] = Group(updated, pod is not None and not stale)
        decided = step(role.replicas, groups, role.surge)
        return Plan(
            tuple(self.group(serving, index) for index in sorted(decided.apply)),
            tuple(self._deletion(serving, existing[index]) for index in sorted(decided.delete)),
            rolling=decided.rolling,
        )

    def _role(self, serving: Serving, role: RoleGroup) -> Object:
        """One entry of ``spec.roles``; an application's own replicas are groups, so its role has one."""
        replicas = role.replicas if serving.disaggregated else 1
        container = "main" if serving.disaggregated else "instance"
        # A group of an application is replaced as a whole, after another one serves in its place.
        rolling = role.surge if serving.disaggregated else Surge(1, 0)
        mark = self._hash(serving, role)
        leader = _marked(with_scheduler(renamed(role.leader, container), serving.gang), mark)
        if role.name == ROUTER_ROLE:
            return self._standalone(role, replicas, leader)
        worker = _marked(with_scheduler(renamed(role.worker or role.leader, container), serving.gang), mark)
        base, leader_patch, worker_patch = patches(leader, worker)
        common: Object = {"name": role.name, "replicas": replicas, "rolloutStrategy": _rollout(rolling)}
        if self._api == RBG_V1ALPHA2:
            pattern = {
                "size": role.size,
                "template": base,
                "leaderTemplatePatch": leader_patch,
                "workerTemplatePatch": worker_patch,
                # The string form: 0.7 reads nothing else, later releases still do.
                "restartPolicy": "RecreateRoleInstanceOnPodRestart",
            }
            if self._lws:
                common["annotations"] = {WORKLOAD_TYPE: f"{LWS.api_version}/{LWS.kind}"}
            return {**common, "leaderWorkerPattern": pattern}
        return {
            **common,
            "restartPolicy": "RecreateRoleInstanceOnPodRestart",
            "workload": {"apiVersion": LWS.api_version, "kind": LWS.kind},
            "template": base,
            "leaderWorkerSet": {
                "size": role.size,
                "patchLeaderTemplate": leader_patch,
                "patchWorkerTemplate": worker_patch,
            },
        }

    def _standalone(self, role: RoleGroup, replicas: int, template: Object) -> Object:
        common: Object = {"name": role.name, "replicas": replicas, "rolloutStrategy": _rollout(role.surge)}
        if self._api == RBG_V1ALPHA2:
            common["annotations"] = {WORKLOAD_TYPE: f"{DEPLOYMENT.api_version}/{DEPLOYMENT.kind}"}
            return {**common, "standalonePattern": {"template": template}}
        workload = {"apiVersion": DEPLOYMENT.api_version, "kind": DEPLOYMENT.kind}
        return {**common, "restartPolicy": "None", "workload": workload, "template": template}

    def _hash(self, serving: Serving, role: RoleGroup) -> str:
        gang = serving.gang._asdict() if serving.gang else None
        return template_hash([role.name, role.size, role.leader, role.worker, gang, self._api, self._lws])

    def _existing(self, serving: Serving, observed: Observed) -> dict[int, Object]:
        found: dict[int, Object] = {}
        for item in observed.objects:
            stem, dash, index = item["metadata"]["name"].rpartition("-")
            if item["kind"] == "RoleBasedGroup" and dash and stem == serving.name and index.isdecimal():
                found[int(index)] = item
        return found

    def _deletion(self, serving: Serving, item: Object) -> Deletion:
        return Deletion(item["apiVersion"], item["kind"], serving.namespace, item["metadata"]["name"])

    def _is_leader_of(self, serving: Serving, role: RoleGroup, pod: Object) -> bool:
        """Arks labelled every pod of a multi-pod group leader, and engines behind frontends of their own are none: the
        index tells leaders apart, where there is one. A group of another runtime counts as long as it serves.
        """
        labels = pod["metadata"].get("labels") or {}
        wanted = role.leader["metadata"]["labels"]
        stem, _, group = self._group_of(pod).rpartition("-")
        ours = stem == serving.name and group.isdecimal() and labels.get(STAGE_LABEL) == wanted.get(STAGE_LABEL)
        if pod["metadata"].get("deletionTimestamp") or not ours:
            return False
        index = labels.get(WORKER_INDEX_LABEL)
        return index == "0" if index is not None else labels.get(ROLE_LABEL) in {"leader", wanted.get(ROLE_LABEL)}

    def _serves(self, serving: Serving, role: RoleGroup, pod: Object) -> bool:
        return self._is_leader_of(serving, role, pod) and is_ready(pod)

    def _group_of(self, pod: Object) -> str:
        labels = pod["metadata"].get("labels") or {}
        return next((str(labels[key]) for key in GROUP_LABELS if key in labels), "")

    def _pod_hash(self, pod: Object) -> str:
        return str((pod["metadata"].get("annotations") or {}).get(TEMPLATE_HASH, ""))


def _marked(template: Object, mark: str) -> Object:
    meta = template["metadata"]
    annotations = {**(meta.get("annotations") or {}), TEMPLATE_HASH: mark}
    return {**template, "metadata": {**meta, "annotations": annotations}}


def _gang_policy(gang: Gang) -> Object:
    if gang.scheduler == "kube":
        return {"kubeScheduling": {"scheduleTimeoutSeconds": gang.timeout_s}}
    asked = {"priorityClassName": gang.priority_class, "queue": gang.queue}
    return {"volcanoScheduling": {key: value for key, value in asked.items() if value}}


def _gang_annotations(gang: Gang) -> dict[str, str]:
    if gang.scheduler == "kube":
        return {_GANG: "true", f"{_GANG}-timeout": str(gang.timeout_s)}
    asked = {f"{_GANG}-volcano-priority": gang.priority_class, f"{_GANG}-volcano-queue": gang.queue}
    return {_GANG: "true", **{key: value for key, value in asked.items() if value}}


__all__ = ["RBG_V1ALPHA1", "RBG_V1ALPHA2", "RbgWorkload", "patches"]
