"""Objects of a workload that ran an application before another one took over."""

from __future__ import annotations

from collections.abc import Iterable

from apis.resources.base import Resource
from controller.reconcile.desired.metadata import owned_by
from controller.workloads.model import Deletion, Object, Observed, Plan, Serving, Workload

_KINDS_OF_OURS = ("Deployment", "LeaderWorkerSet", "RoleBasedGroup", "RoleBasedGroupSet")


def predecessors(
    resource: Resource, workload: Workload, serving: Serving, plan: Plan, observed: Observed, beside: Iterable[Object]
) -> tuple[Deletion, ...]:
    """What another workload made of this application; while it is there, it serves. ``beside``: applied, too."""
    ours = {(item["kind"], item["metadata"]["name"]) for item in (*plan.apply, *beside)}
    ours |= {(item.kind, item.name) for item in plan.delete} | {("Deployment", frontend_name(serving.name))}
    kinds = {kind.kind for kind in workload.kinds}
    return tuple(
        Deletion(item["apiVersion"], item["kind"], serving.namespace, item["metadata"]["name"])
        for item in observed.objects
        if item["kind"] in _KINDS_OF_OURS
        and (item["kind"], item["metadata"]["name"]) not in ours
        and not (workload.name == "rbg" and item["kind"] in kinds)
        and owned_by(item, resource)
    )


def leftovers(
    workload: Workload, serving: Serving, observed: Observed, before: tuple[Deletion, ...]
) -> tuple[Deletion, ...]:
    """They go once the new workload serves, and not before."""
    counts = workload.status(serving, observed)
    if any(role.replicas and counts[role.name].ready == 0 for role in serving.roles):
        return ()
    return before


def frontend_name(application: str) -> str:
    """Dynamo's frontends: a Deployment beside any workload."""
    return f"{application}-frontend"


def dynamo_account(application: str) -> str:
    return f"arks-dynamo-{application}"


def router_account(application: str) -> str:
    return f"arks-router-{application}"


def beside_workloads(application: str) -> tuple[tuple[str, str], ...]:
    """(kind, name) of all that some spec needs beside its workload and its Service, and another does not."""
    accounts = (dynamo_account(application), router_account(application))
    granted = tuple((kind, name) for name in accounts for kind in ("RoleBinding", "Role", "ServiceAccount"))
    return (("Deployment", frontend_name(application)), ("Service", dynamo_account(application)), *granted)
