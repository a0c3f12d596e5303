"""What a limit store is asked and answers. A reservation is a lease: settled once, released once, or expired (charged).

Windows are fixed and aligned to UTC (as Arks counts them): a request belongs to the window in which it was admitted,
also when it ends in a later one. `window_s` 0 is a lifetime counter (quota).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

Unit: TypeAlias = Literal["requests", "prompt", "response", "total", "concurrent"]


class Amounts(NamedTuple):
    """What one request takes: requests, prompt tokens, response tokens. `total` counts both kinds of tokens."""

    requests: int
    prompt: int
    response: int


class Rule(msgspec.Struct, frozen=True, gc=False):
    """One counter that a request must fit under. Rules with the same `key` share one counter.

    There are a handful per token: kept out of the collector's sight, or it pauses the loop to look at them all.
    """

    key: str
    """stable over restarts, e.g. rate/default/example-token/qwen-7b/tpm or quota/default/basic-quota/total"""
    kind: str
    """the user's name for it: rpm, rpd, tpm, tpd, prompt, response, total, concurrency"""
    unit: Unit
    limit: int
    window_s: int
    """60, 86400, or 0 for a counter that never resets"""


QUOTA_RETRY_AFTER_S: Final = 3600
"""A spent quota does not refill by itself; clients that insist are told to come back in an hour."""


class Standing(NamedTuple):
    """The tightest rule of a unit family, for x-ratelimit-* headers."""

    limit: int
    remaining: int
    reset_s: float
    """until the window ends; 0 for a counter that never resets"""

    @property
    def told_reset_s(self) -> int:
        """What clients are told: whole seconds, and of what never resets the same as its retry-after."""
        return math.ceil(self.reset_s or QUOTA_RETRY_AFTER_S)


class Lease(msgspec.Struct):
    """An admitted request's hold on its counters."""

    id: str
    amounts: Amounts
    holds: Any
    """the store's own"""
    seen: Any
    """the store's own: what its counters showed at admission, and what can read that"""
    saved: bool = False
    """the journal's own: it took the lease, so it has to be told when the lease ends"""

    def standings(self) -> tuple[Standing | None, Standing | None]:
        """Tightest rpm/rpd, and tightest tpm/tpd/quota, right after this reservation. Made when asked for."""
        if self.seen is None:
            return None, None
        reading, loads, at_s = self.seen
        standings: tuple[Standing | None, Standing | None] = reading.standings(loads, at_s)
        return standings

    @property
    def requests(self) -> Standing | None:
        return self.standings()[0]

    @property
    def tokens(self) -> Standing | None:
        return self.standings()[1]


@dataclass(frozen=True, slots=True)
class Refusal:
    """No counter was touched."""

    rule: Rule
    used: int
    """spent plus reserved by open leases, before this request"""
    asked: int
    retry_after_s: float | None
    """None: waiting does not help (a quota)"""
    requests: Standing | None
    tokens: Standing | None


Context: TypeAlias = Callable[[], bytes]
"""makes a lease's context. Few leases live long enough to be saved, so it is not made at admission. Any thread."""


class StoreUnavailable(Exception):  # noqa: N818 - a state of the store, mapped to gRPC UNAVAILABLE
    """The store can neither admit nor refuse now."""


class LimitStore(Protocol):
    """Exact under concurrency: the admitted sum of a counter never passes its limit by one."""

    def reserve(
        self, lease_id: str, rules: tuple[Rule, ...], amounts: Amounts, *, ttl_s: float, context: Context = bytes
    ) -> Lease | Refusal:
        """All rules or none. `context` is asked for what travels with the lease when it is saved, or expires."""

    def settle(self, lease: Lease, actual: Amounts) -> None:
        """Charge what was used and return the rest. A second call for the same lease does nothing."""

    def release(self, lease: Lease) -> None:
        """Return everything: the request reached no engine, or the engine failed it. Idempotent like `settle`."""
