"""Wheel: thousands of running streams on one timer.

A timer per token and stream would cost more than the token. Due times are rounded up to a millisecond; whatever falls
into the same one is called together. Entries cannot be cancelled: the callee looks at its own state.
"""

import asyncio
import heapq
import logging
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
_TICKS_PER_S = 1000


class Wheel:
    """Lives as long as its loop; `close` forgets what is left."""

    __slots__ = ("_buckets", "_loop", "_next_tick", "_ticks", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, list[Callable[[], None]]] = {}
        self._ticks: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._next_tick = 0

    def time_s(self) -> float:
        return self._loop.time()

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Call `call` once the loop's clock has reached `when_s`."""
        tick = int(when_s * _TICKS_PER_S) + 1
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.append(call)
            return
        self._buckets[tick] = [call]
        heapq.heappush(self._ticks, tick)
        if self._timer is None or tick < self._next_tick:
            self._arm(tick)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._buckets.clear()
        self._ticks.clear()

    def _arm(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next_tick = tick
        self._timer = self._loop.call_at(tick / _TICKS_PER_S, self._turn)

    def _turn(self) -> None:
        self._timer = None
        now_tick = self._loop.time() * _TICKS_PER_S
        ticks = self._ticks
        # Half a tick of tolerance: loop timers have their own, coarser rounding.
        while ticks and ticks[0] <= now_tick + 0.5:
            for call in self._buckets.pop(heapq.heappop(ticks)):
                try:
                    call()
                except Exception:
                    _LOG.exception("a timed step failed")
        if ticks and self._timer is None:
            self._arm(ticks[0])
