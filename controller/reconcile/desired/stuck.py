"""Why a pod does not start, where it says so and will not go on by itself soon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from controller.workloads.model import Object, is_ready

_STUCK: Final = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"}
)
_CRASHING: Final = "CrashLoopBackOff"


def stuck(pod: Object) -> str:
    """As Kubernetes says it; empty where nothing holds the pod up."""
    for each in pod["status"].get("conditions") or ():
        if each["type"] == "PodScheduled" and each["status"] == "False" and each.get("reason") == "Unschedulable":
            return f"Unschedulable: {each.get('message', '')}".rstrip(": ")
    for waiting in _waiting(pod):
        if waiting.get("reason") in _STUCK:
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""


def first_stuck(pods: Iterable[Object]) -> str:
    """The first of an application's pods that is held up, and by what."""
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if is_ready(pod) or pod["metadata"].get("deletionTimestamp"):
            continue
        why = stuck(pod)
        if not why and any(waiting.get("reason") == _CRASHING for waiting in _waiting(pod)):
            # Its message counts the seconds to the next start.
            why = f"{_CRASHING}: the engine ends again and again, its log says why"
        if why:
            return f"pod {pod['metadata']['name']}: {why}"
    return ""


def _waiting(pod: Object) -> list[Object]:
    return [each["state"].get("waiting") or {} for each in pod["status"].get("containerStatuses") or ()]
