"""Kubernetes Events on transitions: what `kubectl describe` shows under an object.

`record` never waits and never fails: it queues, `run()` sends. The same thing said again about the same object within
`window_s` is only counted; each object has a small budget, the whole program another, and the queue is bounded: a
crash loop cannot flood the API. An API server that is away, or a Lease that is lost and won again, is waited for; what
cannot be sent all the same is dropped and counted: Events are for people, state lives in conditions.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from controller.kube.backoff import pause_s
from controller.kube.client import Client, Object
from controller.kube.errors import (
    AlreadyExistsError,
    KubeError,
    NotLeaderError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)
from controller.kube.metrics import EventStats
from controller.kube.resource import EVENTS, Resource

WINDOW_S = 600.0
PER_OBJECT = 10  # in one window
PER_S, BURST = 5.0, 50.0
WAITING_MAX = 200
REMEMBERED_MAX = 4096
NOTE_MAX = 1024  # the API refuses longer ones
TRIES = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
_PASSING = (NotLeaderError, TooManyRequestsError, UnavailableError, UnreachableError)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an Event is about."""

    resource: Resource
    name: str
    namespace: str
    uid: str = ""


@dataclass(slots=True)
class _Memory:
    since: float
    said: dict[tuple[str, str], int]  # (reason, note) to how often


@dataclass(frozen=True, slots=True)
class _Recorded:
    at: float
    event: Object
    namespace: str


class Events:
    """Sends Events of one component. `run()` is a task of the leader: its client is a fenced one.

    What one run could not send, the next one does, unless it is older than `window_s`.
    """

    def __init__(
        self,
        client: Client,
        component: str = "arks-controller",
        instance: str = "",
        *,
        window_s: float = WINDOW_S,
        per_object: int = PER_OBJECT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = EventStats()
        self._client, self._component, self._instance = client, component, instance or component
        self._window_s, self._per_object, self._clock = window_s, per_object, clock
        self._memory: OrderedDict[Subject, _Memory] = OrderedDict()
        self._budget, self._budget_at = BURST, clock()
        self._waiting: asyncio.Queue[_Recorded] = asyncio.Queue(WAITING_MAX)
        self._sending: _Recorded | None = None

    def record(
        self, subject: Subject, reason: str, note: str, *, kind: Literal["Normal", "Warning"] = "Normal"
    ) -> None:
        """Say that something happened to `subject`. `reason` is one CamelCase word; `note` holds no secret."""
        now = self._clock()
        memory = self._memory.pop(subject, None)
        if memory is None or now - memory.since >= self._window_s:
            memory = _Memory(now, {})
        self._memory[subject] = memory
        if len(self._memory) > REMEMBERED_MAX:
            self._memory.popitem(last=False)
        said = (reason, note)
        if said in memory.said:
            memory.said[said] += 1
            self.stats.repeated += 1
            return
        self._budget = min(BURST, self._budget + (now - self._budget_at) * PER_S)
        self._budget_at = now
        if len(memory.said) >= self._per_object or self._budget < 1 or self._waiting.full():
            self.stats.limited += 1
            return
        self._budget -= 1
        memory.said[said] = 1
        event = self._event(subject, reason, note, kind)
        self._waiting.put_nowait(_Recorded(now, event, subject.namespace or "default"))

    async def run(self) -> None:
        """Send what is recorded, for ever."""
        while True:
            if self._sending is None:
                self._sending = await self._waiting.get()
            if self._clock() - self._sending.at < self._window_s:
                await self._send(self._sending)
            self._sending = None

    async def _send(self, recorded: _Recorded) -> None:
        for tries in range(1, TRIES + 1):
            try:
                await self._client.create(EVENTS, recorded.event, recorded.namespace)
            except AlreadyExistsError:
                pass  # a try whose answer was lost had arrived
            except KubeError as error:
                if tries < TRIES and isinstance(error, _PASSING):
                    await asyncio.sleep(pause_s(tries, FIRST_PAUSE_S, LONGEST_PAUSE_S))
                    continue
                self.stats.failed += 1
                _log.warning("event not sent", reason=recorded.event["reason"], error=str(error))
                return
            self.stats.sent += 1
            return

    def _event(self, subject: Subject, reason: str, note: str, kind: str) -> Object:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        namespace = subject.namespace or "default"
        about = {
            "apiVersion": subject.resource.api_version,
            "kind": subject.resource.kind,
            "name": subject.name,
            "namespace": subject.namespace,
            "uid": subject.uid,
        }
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{subject.name[:230]}.{secrets.token_hex(8)}", "namespace": namespace},
            "involvedObject": {name: value for name, value in about.items() if value},
            "reason": reason,
            "message": note if len(note) <= NOTE_MAX else note[: NOTE_MAX - 1] + "…",
            "type": kind,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
