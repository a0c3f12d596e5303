"""What quotas have used, as extproc last reported it: what `status.quotaStatus` of an ArksQuota is to say.

One per process, filled by the policy stream's server and read by the quota's loop. Only the newest report of a quota is
kept, and none of a quota that is gone. A controller that has just started knows nothing: until a report comes, what the
status says stays.

Each replica hears its own extproc alone, and the Lease's holder writes what it heard. With several replicas the status
is therefore what the leader's extproc has counted, as each of them counts for itself until they share a store; it may
go back when the lead changes.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from controller.kube.resource import Key

EVERY_S: Final = 10.0
"""between two writes of one quota's use"""


@dataclass(frozen=True, slots=True)
class Spent:
    """Of one kind."""

    used: int
    """tokens"""
    since: str
    """when this was first heard, RFC 3339"""


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Spending:
    """`changed`: called with the key of a quota whose use is another one than before, or heard for the first time."""

    def __init__(
        self,
        changed: Callable[[Key], None] = lambda _key: None,
        *,
        every_s: float = EVERY_S,
        now: Callable[[], str] = _now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed, self._every_s, self._now, self._clock = changed, every_s, now, clock
        self._spent: dict[Key, dict[str, Spent]] = {}
        self._written_s: dict[Key, float] = {}

    def report(self, key: Key, used: Mapping[str, int]) -> None:
        """Take over what extproc says, tokens by kind."""
        known = self._spent.get(key)
        if known is not None and {kind: spent.used for kind, spent in known.items()} == used:
            return
        before, now = known or {}, self._now()
        self._spent[key] = {
            kind: before[kind] if kind in before and before[kind].used == tokens else Spent(tokens, now)
            for kind, tokens in used.items()
        }
        self._changed(key)

    def forget(self, key: Key) -> None:
        """The quota is gone."""
        self._spent.pop(key, None)
        self._written_s.pop(key, None)

    def heard_of(self, key: Key) -> bool:
        return key in self._spent

    def entries(self, key: Key, kinds: Sequence[str], live: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """What `status.quotaStatus` shall be; `live` is what it is. An entry whose use is the same stays as it is."""
        spent = self._spent.get(key)
        if spent is None:
            return list(live)
        there = {each["type"]: each for each in live}
        entries: list[Mapping[str, Any]] = []
        for kind in dict.fromkeys(kinds):
            old, new = there.get(kind), spent.get(kind)
            if new is not None and (old is None or old["used"] != new.used):
                entries.append({"type": kind, "used": new.used, "lastUpdateTime": new.since})
            elif old is not None:
                entries.append(dict(old))
        return entries

    # -- pace -----------------------------------------------------------------------------------------------------

    def wait_s(self, key: Key) -> float:
        """Until this quota's use may be written again; 0: now."""
        written_s = self._written_s.get(key)
        return 0.0 if written_s is None else max(0.0, written_s + self._every_s - self._clock())

    def written(self, key: Key) -> None:
        if key in self._spent:
            self._written_s[key] = self._clock()
