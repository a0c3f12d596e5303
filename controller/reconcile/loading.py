"""How far a download is, told by its Job and the Job's pods.

The loader's last word is its termination message (`controller.models.report`): the revision of what it loaded, or the
cause of a failure and the field to look at. Its reason becomes the condition's. While it runs, the same line is the
last of its log (`downloads`).
"""

from __future__ import annotations

import datetime as dt
import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from controller.kube.client import Object
from controller.models.report import Report, parse_report
from controller.reconcile.desired.stuck import stuck

LOAD_FAILED: Final = "ModelLoadFailed"
# What a loader says lands in a condition, and an API server takes no other form of reason there.
_REASON: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")


class State(enum.Enum):
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Loading:
    state: State
    message: str = ""
    reason: str = ""
    """of a failure"""
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
        failed = _failure(reports)
        text = _why(failed) or _raw_words(mine) or str(said.get("message") or "Unknown failure reason")
        reason = failed.reason if failed is not None and _REASON.fullmatch(failed.reason) else LOAD_FAILED
        return Loading(State.FAILED, text, reason, failed_at=_time(said.get("lastTransitionTime")))
    waiting = next((text for pod in mine if (text := stuck(pod))), "")
    running = next((pod["metadata"]["name"] for pod in mine if pod["status"]["phase"] == "Running"), "")
    if not waiting and reports and reports[-1].state == "failed":
        waiting = f"trying again after: {_why(_failure(reports))}"
    return Loading(State.LOADING, waiting, running=running)


def _failure(reports: list[Report]) -> Report | None:
    return next((report for report in reversed(reports) if report.state == "failed"), None)


def _why(failed: Report | None) -> str:
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
            if not end.get("exitCode"):
                continue
            if end.get("reason") == "OOMKilled":
                return "spec.instanceSpec.resources: the loader was ended for the memory it used (OOMKilled)"
            text = str(end.get("message") or end.get("reason") or "").strip()
            if not text or parse_report(text) is not None:  # how far it was is not why it ended
                return f"the loader ended with status {end['exitCode']}"
            return text[-500:]
    return ""


def _time(text: object) -> dt.datetime | None:
    return dt.datetime.fromisoformat(text) if isinstance(text, str) else None
