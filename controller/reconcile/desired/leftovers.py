"""Objects of a workload that ran an application before another one took over."""

from __future__ import annotations

from apis.resources.base import Resource
from controller.reconcile.desired.metadata import owned_by
from controller.workloads.model import Deletion, Observed, Plan, Serving, Workload

_KINDS_OF_OURS = ("Deployment", "LeaderWorkerSet", "RoleBasedGroup")


def leftovers(
    resource: Resource, workload: Workload, serving: Serving, plan: Plan, observed: Observed
) -> tuple[Deletion, ...]:
    """They go once the new workload serves, and not before."""
    counts = workload.status(serving, observed)
    if any(role.replicas and counts[role.name].ready == 0 for role in serving.roles):
        return ()
    ours = {(item["kind"], item["metadata"]["name"]) for item in plan.apply}
    ours |= {(item.kind, item.name) for item in plan.delete} | {("Deployment", f"{serving.name}-frontend")}
    kinds = {kind.kind for kind in workload.kinds}
    return tuple(
        Deletion(item["apiVersion"], item["kind"], serving.namespace, item["metadata"]["name"])
        for item in observed.objects
        if item["kind"] in _KINDS_OF_OURS
        and (item["kind"], item["metadata"]["name"]) not in ours
        and not (workload.name == "rbg" and item["kind"] in kinds)
        and owned_by(item, resource)
    )
