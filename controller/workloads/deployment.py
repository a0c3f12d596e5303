"""Plain Deployments: for groups of one pod where neither LWS nor RBG is installed, and for routers always."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from controller.engines.model import LWS_VARIABLES, GroupVariables, Problem
from controller.workloads.model import (
    APPLICATION_LABEL,
    CONTAINER,
    DEPLOYMENT,
    GVK,
    Counts,
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

DEPLOYMENT_LABEL = "arks.ai/deployment"


def container_name(serving: Serving) -> str:
    return "main" if serving.disaggregated else "instance"


def deployment(serving: Serving, role: RoleGroup, name: str) -> Object:
    """A Deployment whose selector names itself: no two of one application overlap, and as a selector can never be
    changed, it holds nothing that another spec would change.
    """
    labels = role.leader["metadata"]["labels"]
    chosen = {APPLICATION_LABEL: labels[APPLICATION_LABEL], DEPLOYMENT_LABEL: name}
    template = renamed(role.leader, container_name(serving))
    template = {**template, "metadata": {**template["metadata"], "labels": {**labels, **chosen}}}
    rolling = role.surge
    return {
        "apiVersion": DEPLOYMENT.api_version,
        "kind": DEPLOYMENT.kind,
        "metadata": metadata(serving, name),
        "spec": {
            "replicas": role.replicas,
            "selector": {"matchLabels": chosen},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": rolling.max_unavailable, "maxSurge": rolling.max_surge},
            },
            "template": template,
        },
    }


def deployment_counts(item: Object | None) -> Counts:
    if item is None:
        return Counts()
    status = item.get("status")
    updated = int_of(status, "updatedReplicas") if up_to_date(item) else 0
    return Counts(int_of(status, "replicas"), int_of(status, "readyReplicas"), updated)


class DeploymentWorkload:
    name: Literal["lws", "rbg", "deployment"] = "deployment"
    kinds: tuple[GVK, ...] = (DEPLOYMENT,)
    variables: GroupVariables = LWS_VARIABLES

    def __init__(self, missing: tuple[Problem, ...] = ()) -> None:
        self._problems = missing

    def object_name(self, serving: Serving, role: RoleGroup) -> str:
        return f"{serving.name}-{role.name}" if serving.disaggregated else serving.name

    def build(self, serving: Serving, observed: Observed) -> Plan:
        problems = list(self._problems)
        if serving.gang is not None:
            problems.append(
                Problem(
                    "GangSchedulingUnavailable",
                    "spec.podGroupPolicy",
                    "pods are scheduled one by one: neither RoleBasedGroup nor LeaderWorkerSet is installed",
                    blocking=False,
                )
            )
        objects = tuple(deployment(serving, role, self.object_name(serving, role)) for role in serving.roles)
        return Plan(objects, problems=tuple(problems))

    def status(self, serving: Serving, observed: Observed) -> Mapping[str, Counts]:
        return {
            role.name: deployment_counts(observed.find(DEPLOYMENT.kind, self.object_name(serving, role)))
            for role in serving.roles
        }


__all__ = ["CONTAINER", "DeploymentWorkload", "deployment", "deployment_counts"]
