"""What a desired-state function is told of the world, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from apis.resources.workload import RollingUpdate
from controller.engines.model import SERVING_PORT, MetricNames, Problem
from controller.workloads.model import (
    GVK,
    Counts,
    Object,
    Observed,
    Plan,
    Serving,
    Surge,
    Workload,
    pods_serving,
)

FRONTEND_ROLE = "frontend"


@dataclass(frozen=True, slots=True)
class World:
    """What the functions may know of the cluster besides the resource itself."""

    served: AbstractSet[GVK]
    observed: Observed = field(default_factory=Observed)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Desired:
    """``objects`` to apply beside the plan's; ``driver`` is the workload's name for the status. ``moving``: another
    workload's pods still serve beside the new one's. ``frontends``: how many stand before the engines, if any.
    """

    objects: tuple[Object, ...] = ()
    plan: Plan = field(default_factory=Plan)
    problems: tuple[Problem, ...] = ()
    serving: Serving | None = None
    workload: Workload | None = None
    metrics_port: int = SERVING_PORT
    metrics: MetricNames = field(default_factory=MetricNames)
    moving: bool = False
    frontends: int = 0

    @property
    def blocked(self) -> Problem | None:
        return next((problem for problem in self.problems if problem.blocking), None)

    @property
    def driver(self) -> str:
        return self.workload.name if self.workload else ""

    def counts(self, observed: Observed) -> Mapping[str, Counts]:
        """Per role, over all groups; when blocked, what the pods themselves tell. Engines behind frontends serve no
        more than these do.
        """
        leaders = pods_serving(observed.pods)
        if self.workload is None or self.serving is None:
            return leaders
        counts = dict(self.workload.status(self.serving, observed))
        if self.moving:
            counts = {role: _either(count, leaders.get(role, Counts())) for role, count in counts.items()}
        if self.frontends:
            (role, engines), front = next(iter(counts.items())), leaders.get("inference", Counts())
            counts = {role: engines._replace(ready=engines.ready if front.ready else 0), FRONTEND_ROLE: front}
        return counts


def _either(new: Counts, pods: Counts) -> Counts:
    return Counts(max(new.replicas, pods.replicas), max(new.ready, pods.ready), new.updated)


def rolling(given: RollingUpdate | None) -> Surge | None:
    return Surge(given.max_unavailable, given.max_surge, given.partition) if given is not None else None


def blocked(*problems: Problem | None) -> Desired | None:
    found = tuple(problem for problem in problems if problem is not None)
    return Desired(problems=found) if any(problem.blocking for problem in found) else None
