"""Which API runs an application: what the user asks for, then what already runs it, then what is installed."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from controller.engines.model import Problem
from controller.workloads.deployment import DeploymentWorkload
from controller.workloads.lws import LwsWorkload
from controller.workloads.model import GVK, LWS, RBG_V1ALPHA1, RBG_V1ALPHA2, Observed, Workload
from controller.workloads.rbg import RbgWorkload

WORKLOAD_ANNOTATION = "arks.ai/workload"


def choose(
    served: AbstractSet[GVK],
    observed: Observed,
    *,
    application: str,
    size: int,
    disaggregated: bool = False,
    preferred: str = "",
) -> tuple[Workload | None, Problem | None]:
    """The workload, or what is missing; a Deployment instead of a group comes with a problem that blocks nothing.

    ``size`` is the largest group of the application. An LWS that Arks made stays an LWS unless the user wants another;
    otherwise RBG comes before LWS, as Arks chose.
    """
    available: dict[str, Workload] = {}
    if RBG_V1ALPHA2 in served:
        available["rbg"] = RbgWorkload(RBG_V1ALPHA2, lws=LWS in served)
    elif RBG_V1ALPHA1 in served and LWS in served:
        available["rbg"] = RbgWorkload(RBG_V1ALPHA1)
    if LWS in served:
        available["lws"] = LwsWorkload()
    if size == 1:
        available["deployment"] = DeploymentWorkload()
    if preferred:
        if preferred in available:
            return available[preferred], None
        return None, _missing(f"annotation {WORKLOAD_ANNOTATION} asks for {preferred!r}", size)
    legacy = f"{application}-prefill" if disaggregated else application
    if "lws" in available and observed.find(LWS.kind, legacy) is not None:
        return available["lws"], None
    groups = [name for name in ("rbg", "lws") if name in available]
    if size == 1 and not groups:
        note = Problem(
            "WorkloadApiMissing",
            "spec.size",
            "neither RoleBasedGroup nor LeaderWorkerSet is installed; running as a plain Deployment",
            blocking=False,
        )
        return available["deployment"], note
    if observed.find("Deployment", _deployment_name(application, disaggregated=disaggregated)) and size == 1:
        return available["deployment"], None
    if groups:
        return available[groups[0]], None
    return None, _missing("groups of several pods need LeaderWorkerSet or RoleBasedGroup", size)


def _deployment_name(application: str, *, disaggregated: bool) -> str:
    return f"{application}-prefill" if disaggregated else application


def _missing(why: str, size: int) -> Problem:
    return Problem("WorkloadApiMissing", "spec.size", f"size is {size}: {why}, which this cluster does not serve")
