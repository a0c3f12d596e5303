"""Status and conditions: written when they differ, and only then; an Event for each transition.

A condition keeps its `lastTransitionTime` until its status changes. What we wrote is remembered until the watch has
brought it back, so that a pass in between neither writes again nor forgets a time. Condition types of others stay:
server-side apply touches only what we name. For the same reason it leaves what we no longer say where somebody else
has written it, too; that is taken back by a patch. A resource that was deleted meanwhile is no error.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from controller.kube.client import Client, Object
from controller.kube.errors import NotFoundError
from controller.kube.events import Events, Subject
from controller.kube.resource import Resource
from controller.reconcile.desired.phase import Verdict

MESSAGE_MAX: Final = 2048
# Types that are ours alone: one of them that we no longer say is taken back.
OURS: Final = frozenset(
    {"Accepted", "Programmed", "Degraded", "Precheck", "Loaded", "Ready", "StorageCreated", "ModelLoaded"}
)
# True is the bad state of these.
_NEGATIVE: Final = frozenset({"Degraded"})
# False for these reasons is a state on the way, or as asked for: nothing to warn about.
_WAITING: Final = frozenset(
    {
        "Disabled",
        "ModelLoading",
        "NotStarted",
        "PrecheckFailed",
        "ReplicasNotReady",
        "Retrying",
        "ScaledToZero",
        "StorageCreating",
        "Waiting",
    }
)


@dataclass(frozen=True, slots=True)
class About:
    """The object whose status is written, as it was read."""

    resource: Resource
    namespace: str
    name: str
    uid: str
    generation: int
    version: str
    """resourceVersion of what was read"""
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        return Subject(self.resource, self.name, self.namespace, self.uid)


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class StatusWriter:
    """Writes through one client. One per leadership."""

    def __init__(self, client: Client, events: Events, *, now: Callable[[], str] = _now) -> None:
        self._client, self._events, self._now = client, events, now
        self._written: dict[tuple[str, str, str], tuple[int, Mapping[str, Any]]] = {}

    async def write(
        self,
        about: About,
        verdicts: Sequence[Verdict],
        status: Mapping[str, Any] | None = None,
        *,
        foreign: frozenset[str] = frozenset(),
    ) -> bool:
        """Bring the status to these conditions and fields; True if a write was needed.

        `foreign`: fields of the status that somebody else writes.
        """
        slot = (about.resource.kind, about.namespace, about.name)
        live = self._live(slot, about)
        known = {each["type"]: each for each in live.get("conditions") or ()}
        conditions = [self._condition(about, verdict, known.get(verdict.type)) for verdict in verdicts]
        wanted = {**(status or {}), "observedGeneration": about.generation, "conditions": conditions}
        if not _differs(live, wanted, foreign):
            return False
        body = {
            # The uid keeps a namesake, made while we looked at its predecessor, from getting the wrong status.
            "metadata": {"name": about.name, "namespace": about.namespace, "uid": about.uid},
            "status": wanted,
        }
        try:
            answer = await self._client.apply(about.resource, body, subresource="status")
            answer = await self._take_back(about, answer, wanted, foreign)
        except NotFoundError:
            return False
        self._written[slot] = (_number(answer["metadata"]["resourceVersion"]), answer.get("status") or {})
        for verdict in verdicts:
            self._tell(about, verdict, known.get(verdict.type))
        return True

    async def _take_back(
        self, about: About, answer: Object, wanted: Mapping[str, Any], foreign: frozenset[str]
    ) -> Object:
        """Remove what is ours to say and not said, but stood through our apply, because another wrote it."""
        left = answer.get("status") or {}
        fields = [key for key, value in left.items() if value and key not in {*wanted, *foreign}]
        said = {each["type"] for each in wanted["conditions"]}
        there = left.get("conditions") or []
        kept = [each for each in there if each["type"] in said or each["type"] not in OURS]
        if not fields and len(kept) == len(there):
            return answer
        patch = {
            "metadata": {"resourceVersion": answer["metadata"]["resourceVersion"]},
            "status": {**dict.fromkeys(fields), "conditions": kept},
        }
        return await self._client.patch(about.resource, about.name, about.namespace, patch, subresource="status")

    def latest(self, about: About) -> Mapping[str, Any]:
        """The status as it is now: what we wrote, while the watch has not brought it back yet."""
        return self._live((about.resource.kind, about.namespace, about.name), about)

    def forget(self, resource: Resource, namespace: str, name: str) -> None:
        """The object is gone."""
        self._written.pop((resource.kind, namespace, name), None)

    def _live(self, slot: tuple[str, str, str], about: About) -> Mapping[str, Any]:
        written = self._written.get(slot)
        if written is None:
            return about.status
        if _number(about.version) < written[0]:
            return written[1]
        del self._written[slot]
        return about.status

    def _condition(self, about: About, verdict: Verdict, old: Mapping[str, Any] | None) -> Object:
        same = old is not None and old.get("status") == verdict.status
        since = old.get("lastTransitionTime") if same and old is not None else None
        message = verdict.message
        return {
            "type": verdict.type,
            "status": verdict.status,
            "reason": verdict.reason,
            "message": message if len(message) <= MESSAGE_MAX else message[: MESSAGE_MAX - 1] + "…",
            "lastTransitionTime": since or self._now(),
            "observedGeneration": about.generation,
        }

    def _tell(self, about: About, verdict: Verdict, old: Mapping[str, Any] | None) -> None:
        if old is not None and (old.get("status"), old.get("reason")) == (verdict.status, verdict.reason):
            return
        good = "False" if verdict.type in _NEGATIVE else "True"
        bad = verdict.status not in {good, "Unknown"} and verdict.reason not in _WAITING
        if old is None and not bad and verdict.status != good:
            return  # the beginning is no transition
        self._events.record(about.subject, verdict.reason, verdict.message, kind="Warning" if bad else "Normal")


def _differs(live: Mapping[str, Any], wanted: Mapping[str, Any], foreign: frozenset[str]) -> bool:
    for key in {*live, *wanted} - {"conditions", *foreign}:
        # Absent, zero and empty are one: which of them is shown depends on who read it.
        if (live.get(key) or None) != (wanted.get(key) or None):
            return True
    there = [each for each in live.get("conditions") or () if each["type"] in OURS]
    return _plain(there) != _plain(wanted["conditions"])


def _plain(conditions: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("type", "status", "reason", "message", "lastTransitionTime", "observedGeneration")
    return sorted(tuple(each.get(key) for key in keys) for each in conditions)


def _number(version: str) -> int:
    """Versions of one object are comparable numbers, as the API promises since Kubernetes 1.35."""
    return int(version) if version.isdecimal() else 0
