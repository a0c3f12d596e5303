"""A counter, and a plan: a tuple of rules with its counters already found.

The same tokens send the same rules again and again, so the store compiles each tuple of rules once. What is left per
request is a walk over a few counters.
"""

import hashlib
from typing import TypeAlias

import msgspec

from extproc.limits.model import Rule

NEVER = float("inf")
UNITS = {"requests": 0, "prompt": 1, "response": 2, "total": 3, "concurrent": 4}
"""positions in (requests, prompt, response, prompt + response, 1)"""
REQUESTS = UNITS["requests"]
CONCURRENT = UNITS["concurrent"]


class Counter:
    """One window's sums. `taken` is what was charged plus what open leases hold; `used` is what was charged."""

    __slots__ = ("concurrent", "end_s", "key", "saved", "start_s", "taken", "used", "window_s")

    def __init__(self, key: str, window_s: int, now_s: float) -> None:
        self.key = key
        self.window_s = window_s
        self.start_s = int(now_s // window_s) * window_s if window_s else 0
        self.end_s: float = self.start_s + window_s if window_s else NEVER
        self.taken = 0
        self.used = 0
        self.concurrent = False
        """counts open leases alone, so that at 0 nobody can come back to it"""
        self.saved: tuple[int, int] | None = None
        """(start_s, used) as the journal last took it; the journal's own"""

    def roll(self, now_s: float) -> None:
        """Begin the window that holds `now_s`. `used` goes first: see `read`."""
        self.used = 0
        self.taken = 0
        self.start_s = start_s = int(now_s // self.window_s) * self.window_s
        self.end_s = start_s + self.window_s

    def read(self) -> tuple[int, int]:
        """(start_s, used), from the journal's thread: never a new window's start with an old window's sum."""
        while True:
            start_s = self.start_s
            used = self.used
            if self.start_s == start_s:
                return start_s, used


Asked: TypeAlias = tuple[int, int, int, int, int]
"""what a request takes, by position of the unit"""
Check: TypeAlias = tuple[Counter, int, int]
"""(counter, limit, unit). A plain tuple: the interpreter unpacks those several times faster than named ones."""


class Plan:
    """`checks` has every rule in the caller's order. The others have each counter once, with the lowest of its limits
    where rules share it; `holds` in the order in which the store takes: requests, tokens, concurrent.
    """

    __slots__ = ("_ruleset", "changed", "charged", "checks", "concurrent", "holds", "requests", "rules", "tokens")

    def __init__(self, rules: tuple[Rule, ...], checks: list[Check]) -> None:
        self.rules = rules
        """kept, so that no other tuple can come to the same address while this plan is known by it"""
        lowest: dict[Counter, Check] = {}
        for counter, limit, unit in checks:
            # A counter counts one thing: where rules that share it disagree on their unit, the first one's stands.
            _, known_limit, known_unit = lowest.get(counter, (counter, limit, unit))
            lowest[counter] = (counter, min(limit, known_limit), known_unit)
        self.checks = tuple((counter, limit, lowest[counter][2]) for counter, limit, _ in checks)
        self.requests = tuple(check for check in lowest.values() if check[2] == REQUESTS)
        self.tokens = tuple(check for check in lowest.values() if REQUESTS < check[2] < CONCURRENT)
        self.concurrent = tuple(check for check in lowest.values() if check[2] == CONCURRENT)
        taking = (*self.requests, *self.tokens, *self.concurrent)
        self.holds = tuple((counter, unit) for counter, _, unit in taking)
        self.charged = tuple(counter for counter, unit in self.holds if unit != CONCURRENT)
        self.changed = False
        """some counter was charged, and the journal has not looked since"""
        self._ruleset: tuple[int, bytes] | None = None

    @property
    def ruleset(self) -> int:
        """Names `blob` by its content, as a 64-bit integer."""
        return self._named()[0]

    @property
    def blob(self) -> bytes:
        """What a restart needs to find the counters again: [key, window_s, unit] of each."""
        return self._named()[1]

    def _named(self) -> tuple[int, bytes]:
        if self._ruleset is None:
            blob = msgspec.msgpack.encode([(counter.key, counter.window_s, unit) for counter, unit in self.holds])
            digest = hashlib.blake2b(blob, digest_size=8).digest()
            self._ruleset = int.from_bytes(digest, "big", signed=True), blob
        return self._ruleset
