"""Why a pod does not start, where it says so and will not go on by itself soon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from controller.workloads.model import Object, is_ready

_STUCK: Final = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
_CRASHING: Final = "CrashLoopBackOff"


def stuck(pod: Object) -> str:
    """As Kubernetes says it; empty where nothing holds the pod up."""
    for each in pod["status"].get("conditions") or ():
        if each["type"] == "PodScheduled" and each["status"] == "False" and each.get("reason") == "Unschedulable":
            return f"Unschedulable: {each.get('message', '')}".rstrip(": ")
    for waiting in _waiting(pod):
        if waiting.get("reason") in _STUCK:
            return _steady(waiting)
    return ""


def _steady(waiting: Object) -> str:
    """The same words during a pull's attempts and between them, else the condition would change with each."""
    message = waiting.get("message", "")
    if waiting["reason"] == "ImagePullBackOff":
        # Since Kubernetes 1.32 `Back-off pulling image "…": ` is followed by the attempt's own reason and message.
        _, _, cause = message.partition('": ')
        if cause:
            return str(cause)
    return f"{waiting['reason']}: {message}".rstrip(": ")


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
