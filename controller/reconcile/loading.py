"""How far a download is, told by its Job and the Job's pods.

The loader's last word is its termination message (`controller.models.report`): the revision of what it loaded, or the
cause of a failure and the field to look at. While it runs, the same line is the last of its log.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from controller.kube.client import Client, Object
from controller.kube.errors import KubeError
from controller.models.report import Report, parse_report

LOG_TAIL_BYTES: Final = 8192
# A container that waits for one of these will not go on by itself soon: worth saying.
_STUCK: Final = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"}
)


class State(enum.Enum):
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Loading:
    state: State
    message: str = ""
    revision: str = ""
    running: str = ""
    """name of the pod whose log tells the progress"""
    failed_at: dt.datetime | None = None


def loading_of(job: Object, pods: Iterable[Object]) -> Loading:
    """`pods` are the Job's own."""
    conditions = {each["type"]: each for each in (job.get("status") or {}).get("conditions") or ()}
    mine = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    reports = [report for pod in mine if (report := _last_word(pod)) is not None]
    if _true(conditions, "Complete"):
        revision = next((report.revision for report in reversed(reports) if report.revision), "")
        return Loading(State.LOADED, revision=revision)
    if _true(conditions, "Failed"):
        said = conditions["Failed"]
        text = _why(reports) or _raw_words(mine) or str(said.get("message") or "Unknown failure reason")
        return Loading(State.FAILED, text, failed_at=_time(said.get("lastTransitionTime")))
    waiting = next((text for pod in mine if (text := _stuck(pod))), "")
    running = next((pod["metadata"]["name"] for pod in mine if pod["status"]["phase"] == "Running"), "")
    if not waiting and reports and reports[-1].state == "failed":
        waiting = f"trying again after: {_why(reports)}"
    return Loading(State.LOADING, waiting, running=running)


def _why(reports: list[Report]) -> str:
    failed = next((report for report in reversed(reports) if report.state == "failed"), None)
    if failed is None:
        return ""
    return ": ".join(part for part in (failed.field, failed.message or failed.reason) if part)


def _true(conditions: Mapping[str, Any], type_: str) -> bool:
    return bool(conditions.get(type_, {}).get("status") == "True")


def _ended(pod: Object) -> list[Object]:
    states = [each["state"] for each in pod["status"]["containerStatuses"] if each["name"] == "worker"]
    return [state["terminated"] for state in states if "terminated" in state]


def _last_word(pod: Object) -> Report | None:
    return next((parse_report(str(end.get("message", ""))) for end in _ended(pod)), None)


def _raw_words(pods: list[Object]) -> str:
    """Of a loader that is not ours, or that was killed: the end of what it said."""
    for pod in reversed(pods):
        for end in _ended(pod):
            if end.get("exitCode"):
                text = str(end.get("message") or end.get("reason") or "").strip()
                return text[-500:] or f"the loader ended with status {end['exitCode']}"
    return ""


def _stuck(pod: Object) -> str:
    for each in pod["status"]["containerStatuses"]:
        waiting = each["state"].get("waiting") or {}
        if waiting.get("reason") in _STUCK:
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""


def _time(text: object) -> dt.datetime | None:
    return dt.datetime.fromisoformat(text) if isinstance(text, str) else None


async def progress_of(client: Client, namespace: str, pod: str) -> Report | None:
    """The loader's latest line; None while the pod cannot be asked."""
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log?container=worker&tailLines=3&limitBytes={LOG_TAIL_BYTES}"
    try:
        _, _, text = await client.raw(path, {"Accept": "*/*"})
    except KubeError:
        return None
    return parse_report(text.decode(errors="replace"))
