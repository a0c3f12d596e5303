"""How much is left of each limit, read from what a plan's meters showed when a lease was admitted.

Made when somebody asks: few look at it, and the request that waits for its admission should not pay for it.
"""

from collections.abc import Callable

from extproc.limits.meter import ALL_BYTES
from extproc.limits.model import Standing

_new = tuple.__new__
"""half the cost of a named tuple's own constructor"""


class Reading:
    """Belongs to one binding of a plan. The limits are (limit, window_s), in the order of what `meters` give."""

    __slots__ = ("meters", "requests", "tokens")

    def __init__(self) -> None:
        self.meters: list[Callable[[bytes], tuple[int, ...]]] = []
        """for each meter what takes the counters' fields from its load's bytes: -1 - left of each limit"""
        self.requests: list[tuple[int, int]] = []
        self.tokens: list[tuple[int, int]] = []

    def standings(self, loads: list[int], at_s: float) -> tuple[Standing | None, Standing | None]:
        """The tightest rule of the requests' family and of the tokens'."""
        excess: tuple[int, ...] = ()
        for load, unpack in zip(loads, self.meters, strict=False):
            excess += unpack(load.to_bytes(ALL_BYTES, "little", signed=True))
        standing_requests = standing_tokens = None
        limits = self.requests
        if limits:
            family = excess[: len(limits)]
            worst = max(family)
            limit, window_s = limits[family.index(worst)]
            left = ~worst if worst < 0 else 0
            standing_requests = _new(Standing, (limit, left, window_s - at_s % window_s if window_s else 0.0))
        if self.tokens:
            family = excess[len(limits) :]
            worst = max(family)
            limit, window_s = self.tokens[family.index(worst)]
            left = ~worst if worst < 0 else 0
            standing_tokens = _new(Standing, (limit, left, window_s - at_s % window_s if window_s else 0.0))
        return standing_requests, standing_tokens
