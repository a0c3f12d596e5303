"""LeaderWorkerSet (v0.7 and later): one set per role, its own controller rolls groups one by one.

Gang scheduling: LWS makes a PodGroup per group itself where its configuration names Volcano
(``gangSchedulingManagement.schedulerProvider: volcano``, since 0.7); the queue is an annotation on the set and
pods must name the scheduler. It knows no kube-scheduler-plugins; that is said, not swallowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from controller.engines.model import LWS_VARIABLES, GroupVariables, Problem
from controller.workloads.deployment import deployment, deployment_counts
from controller.workloads.model import (
    DEPLOYMENT,
    GVK,
    LWS,
    STAGE_LABEL,
    Counts,
    Deletion,
    Gang,
    Object,
    Observed,
    Plan,
    RoleGroup,
    Serving,
    int_of,
    metadata,
    renamed,
    up_to_date,
)

VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
ROUTER_ROLE = "scheduler"


def leader_worker_set(serving: Serving, role: RoleGroup, name: str) -> Object:
    """Container names are Arks': a set that Arks made is updated in place, not grown by a second container."""
    leader, worker = ("main", "main") if serving.disaggregated else ("leader", "worker")
    rolling = role.surge
    annotations = {VOLCANO_QUEUE: serving.gang.queue} if serving.gang and serving.gang.queue else None
    return {
        "apiVersion": LWS.api_version,
        "kind": LWS.kind,
        "metadata": metadata(serving, name, annotations),
        "spec": {
            "replicas": role.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {
                    "maxUnavailable": rolling.max_unavailable,
                    "maxSurge": rolling.max_surge,
                    "partition": rolling.partition,
                },
            },
            "leaderWorkerTemplate": {
                "size": role.size,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": with_scheduler(renamed(role.leader, leader), serving.gang),
                "workerTemplate": with_scheduler(renamed(role.worker or role.leader, worker), serving.gang),
            },
        },
    }


def with_scheduler(template: Object, gang: Gang | None) -> Object:
    """Volcano schedules only pods that name it, and takes their priority from the pod."""
    if gang is None or gang.scheduler != "volcano":
        return template
    spec = {"schedulerName": "volcano", **template["spec"]}
    if gang.priority_class:
        spec.setdefault("priorityClassName", gang.priority_class)
    return {**template, "spec": spec}


def lws_counts(item: Object | None) -> Counts:
    """Groups, not pods: a group is ready when its leader and all its workers are."""
    if item is None:
        return Counts()
    status = item.get("status")
    updated = int_of(status, "updatedReplicas") if up_to_date(item) else 0
    return Counts(int_of(status, "replicas"), int_of(status, "readyReplicas"), updated)


class LwsWorkload:
    name: Literal["lws", "rbg", "deployment"] = "lws"
    kinds: tuple[GVK, ...] = (LWS, DEPLOYMENT)
    variables: GroupVariables = LWS_VARIABLES

    def object_name(self, serving: Serving, role: RoleGroup) -> str:
        return f"{serving.name}-{role.name}" if serving.disaggregated else serving.name

    def build(self, serving: Serving, observed: Observed) -> Plan:
        objects = tuple(
            deployment(serving, role, self.object_name(serving, role))
            if role.name == ROUTER_ROLE
            else leader_worker_set(serving, role, self.object_name(serving, role))
            for role in serving.roles
        )
        return Plan(objects, self._replaced_router(serving, observed), self._gang_problems(serving))

    def status(self, serving: Serving, observed: Observed) -> Mapping[str, Counts]:
        counts: dict[str, Counts] = {}
        for role in serving.roles:
            name = self.object_name(serving, role)
            if role.name == ROUTER_ROLE:
                counts[role.name] = deployment_counts(observed.find(DEPLOYMENT.kind, name))
            else:
                counts[role.name] = lws_counts(observed.find(LWS.kind, name))
        return counts

    def _replaced_router(self, serving: Serving, observed: Observed) -> tuple[Deletion, ...]:
        """Arks' router Deployment selects every pod of the application, prefill and decode included. A selector
        cannot be changed, so ours has another name; the old one goes when ours serves.
        """
        old = observed.find(DEPLOYMENT.kind, f"{serving.name}-router")
        if not serving.disaggregated or old is None or STAGE_LABEL in old["spec"]["selector"].get("matchLabels", {}):
            return ()
        successor = deployment_counts(observed.find(DEPLOYMENT.kind, f"{serving.name}-{ROUTER_ROLE}"))
        if successor.ready == 0:
            return ()
        return (Deletion(DEPLOYMENT.api_version, DEPLOYMENT.kind, serving.namespace, f"{serving.name}-router"),)

    def _gang_problems(self, serving: Serving) -> tuple[Problem, ...]:
        if serving.gang is None:
            return ()
        if serving.gang.scheduler == "kube":
            text = "LeaderWorkerSet knows no PodGroup of kube-scheduler-plugins; install RoleBasedGroup or use Volcano"
            return (Problem("GangSchedulingUnavailable", "spec.podGroupPolicy.kubeScheduling", text, blocking=False),)
        return ()
