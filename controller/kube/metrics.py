"""Plain counters of the Kubernetes side. They are only counted here; whoever exports them reads the attributes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ClientStats:
    """`calls` is keyed (verb, group, resource[/subresource], status or reason): what RBAC must grant, too."""

    calls: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    writes_skipped: int = 0  # an apply that would have changed nothing was not sent
    writes_fenced: int = 0  # a write was held back because the lease was lost


@dataclass(slots=True)
class ReflectorStats:
    lists: int = 0
    watches: int = 0
    bookmarks: int = 0
    events: int = 0
    gone: int = 0
    errors: int = 0
    silences: int = 0
    malformed: int = 0
    handler_errors: int = 0


@dataclass(slots=True)
class QueueStats:
    added: int = 0
    done: int = 0
    failed: int = 0
    retried: int = 0
    gave_up: int = 0  # a permanent error waits for the object to change
    timed_out: int = 0


@dataclass(slots=True)
class LeaseStats:
    renewals: int = 0
    errors: int = 0
    elected: int = 0
    lost: int = 0
    released: int = 0
    task_errors: int = 0


@dataclass(slots=True)
class EventStats:
    sent: int = 0
    repeated: int = 0  # the same thing said again within the window
    limited: int = 0
    failed: int = 0
