"""``podGroupPolicy`` in the words of the workloads."""

from __future__ import annotations

from apis.resources.workload import PodGroupPolicy
from controller.engines.model import Problem
from controller.workloads.model import Gang


def gang_of(policy: PodGroupPolicy | None) -> tuple[Gang | None, Problem | None]:
    """At most one scheduler; objects from before that rule may name both."""
    if policy is None:
        return None, None
    kube, volcano = policy.kube_scheduling, policy.volcano_scheduling
    if kube is not None and volcano is not None:
        return None, Problem("InvalidPodGroupPolicy", "spec.podGroupPolicy", "name one scheduler, not two")
    if kube is not None:
        return Gang("kube", timeout_s=kube.schedule_timeout_seconds), None
    if volcano is not None:
        return Gang("volcano", priority_class=volcano.priority_class_name or "", queue=volcano.queue or ""), None
    return None, None
