"""A counter: one limit's window, and where its sums stand."""

from typing import TYPE_CHECKING

from extproc.limits.meter import FIELD, FIELD_BITS, NEVER, SIGN, TOTAL, Meter

if TYPE_CHECKING:
    from typing import TypeAlias

    Place: TypeAlias = tuple[Meter, int, int]
    """(meter, shift of the field, what makes the field and all below it positive)"""


class Counter:
    """One window's sums: fields of a meter, shared with the counters that the same requests take from."""

    __slots__ = ("concurrent", "end_s", "key", "moved_s", "place", "saved", "start_s", "window_s")

    def __init__(self, key: str, window_s: int, now_s: float) -> None:
        self.key = key
        self.window_s = window_s
        self.start_s = int(now_s // window_s) * window_s if window_s else 0
        self.end_s: float = self.start_s + window_s if window_s else NEVER
        self.concurrent = False
        """counts open leases alone, so that at 0 nobody can come back to it"""
        self.moved_s = -NEVER
        """when it last left a meter that it shared"""
        self.saved: tuple[int, int] | None = None
        """(start_s, used) as the journal last took it; the journal's own"""
        self.place: Place
        """changed as a whole: the journal's thread reads it, too"""
        meter = Meter(((self, TOTAL),))
        meter.taken = 0
        meter.start_s = float(self.start_s)
        self.put(meter, 0)

    def put(self, meter: Meter, shift: int) -> None:
        """The meter holds this counter's sums already."""
        self.place = (meter, shift, SIGN * (((1 << (shift + FIELD_BITS)) - 1) // FIELD))

    @property
    def taken(self) -> int:
        """What was charged plus what open leases hold."""
        meter, shift, bias = self.place
        return ((meter.taken + bias) >> shift & FIELD) - SIGN

    @property
    def used(self) -> int:
        """What was charged."""
        meter, shift, bias = self.place
        return ((meter.used + bias) >> shift & FIELD) - SIGN

    def add(self, used: int, taken: int) -> None:
        meter, shift, _ = self.place
        meter.used += used << shift
        meter.taken += taken << shift

    def roll(self, now_s: float) -> None:
        """Begin the window that holds `now_s`. `used` goes first: see `read`."""
        self.add(-self.used, -self.taken)
        self.start_s = start_s = int(now_s // self.window_s) * self.window_s
        self.end_s = float(start_s + self.window_s)
        meter = self.place[0]
        meter.start_s = max(meter.start_s, float(start_s))

    def read(self) -> tuple[int, int]:
        """(start_s, used), from the journal's thread: never a new window's start with an old window's sum."""
        while True:
            start_s = self.start_s
            used = self.used
            if self.start_s == start_s:
                return start_s, used
