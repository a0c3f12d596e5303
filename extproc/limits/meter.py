"""Sums that requests take from together, kept in one integer: a request adds to all of them in one step.

What the interpreter pays for is steps, not digits. So each (unit, window) that a store knows has a field of 96 bits,
and what a request takes is one integer with every field filled. A meter adds that whole integer; the fields that none
of its counters owns gather meaningless sums, which nobody reads. A field may be negative for a while, then the fields
above it show one less; whoever reads a field adds a bias below it first.

A meter whose counters were gathered into another one is dead: it reads as full, so that `reserve` looks closer, and as
begun in the future, so that `settle` goes to each of its counters instead.
"""

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from extproc.limits.counter import Counter

UNITS = {"requests": 0, "prompt": 1, "response": 2, "total": 3, "concurrent": 4}
"""positions in (requests, prompt, response, prompt + response, 1)"""
REQUESTS, PROMPT, RESPONSE, TOTAL, CONCURRENT = range(5)
NEVER = float("inf")

FIELD_BYTES = 12
"""sums stay below 2**94: more requests of the largest amount (2**53) than ever come"""
FIELD_BITS = 8 * FIELD_BYTES
FIELD = (1 << FIELD_BITS) - 1
SIGN = 1 << (FIELD_BITS - 1)
SLACK = SIGN >> 1
_MOST_FIELDS = 15
"""five units in three kinds of windows"""
ALL_BYTES = FIELD_BYTES * (_MOST_FIELDS + 1)
"""holds all fields; one more for what goes beyond the highest"""
_DEAD = SLACK * (((1 << (FIELD_BITS * _MOST_FIELDS)) - 1) // FIELD)

DAY_S = 86_400
_USUAL = (
    *((REQUESTS, 60), (REQUESTS, DAY_S), (TOTAL, 60), (TOTAL, DAY_S)),
    *((PROMPT, 0), (RESPONSE, 0), (TOTAL, 0), (CONCURRENT, 0)),
)
"""requests first: `Plan.standings` reads fields in their order"""

Held: TypeAlias = tuple["Counter", int]
"""(counter, unit)"""


class Fields:
    """Which field belongs to which (unit, window_s). What one request takes is
    `slot + requests * request + prompt_tokens * prompt + response_tokens * response`.
    """

    __slots__ = ("_shifts", "prompt", "request", "response", "slot")

    def __init__(self) -> None:
        self.request = self.prompt = self.response = self.slot = 0
        self._shifts: dict[tuple[int, int], int] = {}
        for unit, window_s in _USUAL:
            self.shift(unit, window_s)

    def shift(self, unit: int, window_s: int) -> int:
        """Where the field begins. A new one goes above all others, so that no known sum changes."""
        known = self._shifts.get((unit, window_s))
        if known is not None:
            return known
        if len(self._shifts) == _MOST_FIELDS:
            raise ValueError(f"too many different windows: {window_s}")
        shift = self._shifts[unit, window_s] = len(self._shifts) * FIELD_BITS
        one = 1 << shift
        if unit == REQUESTS:
            self.request += one
        elif unit == CONCURRENT:
            self.slot += one
        if unit in {PROMPT, TOTAL}:
            self.prompt += one
        if unit in {RESPONSE, TOTAL}:
            self.response += one
        return shift

    @property
    def shifts(self) -> tuple[int, ...]:
        """In rising order."""
        return tuple(self._shifts.values())


class Meter:
    """`taken` is what was charged plus what open leases hold; `used` is what was charged. Dead until `gather`."""

    __slots__ = ("counters", "start_s", "taken", "used")

    def __init__(self, counters: tuple[Held, ...]) -> None:
        self.counters = counters
        self.start_s: float = NEVER
        """when the latest of its windows began"""
        self.taken = _DEAD
        self.used = 0

    @property
    def dead(self) -> bool:
        return self.start_s == NEVER

    def gather(self, shifts: list[int], now_s: float) -> None:
        """Take the counters' sums over. The meters they leave die; counters left behind stay alone."""
        self.taken = 0
        left = set()
        for (counter, _), shift in zip(self.counters, shifts, strict=True):
            self.taken += counter.taken << shift
            self.used += counter.used << shift
            left.add(counter.place[0])
        self.start_s = float(max(counter.start_s for counter, _ in self.counters))
        for (counter, _), shift in zip(self.counters, shifts, strict=True):
            counter.put(self, shift)
        for meter in left:
            for counter, unit in meter.counters:
                if len(meter.counters) > 1:
                    counter.moved_s = now_s
                _, shift, _ = counter.place
                if counter.place[0] is meter:
                    Meter(((counter, unit),)).gather([shift], now_s)
            meter.taken = _DEAD
            meter.start_s = NEVER
