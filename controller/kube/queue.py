"""Keyed work queue: who changed is noted once, handled by few, and tried again with growing pauses.

A key is queued at most once and never handled by two workers at a time; a key added while it is handled is handled
again afterwards, so the handler always sees a state at least as new as the last `add`. The handler is
level-triggered: it gets the key, reads the stores, and returns after how many seconds it wants to look again (or
None). An exception means: again, after 0.2 s, doubling up to `backoff_max_s`, with jitter; a permanent error
(`KubeError.permanent`) waits for the next `add`. Life cycle: `run()` is a task of the owner; `stop()` lets what is in
flight end, cancelling `run()` interrupts it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import structlog

from controller.kube.backoff import pause_s
from controller.kube.errors import KubeError, NotLeaderError
from controller.kube.metrics import QueueStats

K = TypeVar("K", bound=Hashable)
Handle = Callable[[K], Awaitable[float | None]]

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 60.0
HANDLE_TIMEOUT_S = 120.0

_log = structlog.get_logger(__name__)


class WorkQueue(Generic[K]):
    """Queue of keys in front of one handler."""

    def __init__(
        self,
        handle: Handle[K],
        *,
        name: str = "",
        workers: int = 4,
        backoff_first_s: float = BACKOFF_FIRST_S,
        backoff_max_s: float = BACKOFF_MAX_S,
        timeout_s: float = HANDLE_TIMEOUT_S,
    ) -> None:
        self.stats = QueueStats()
        self._handle, self._workers, self._timeout_s = handle, workers, timeout_s
        self._backoff_first_s, self._backoff_max_s = backoff_first_s, backoff_max_s
        self._ready: deque[K] = deque()
        self._queued: set[K] = set()  # in `_ready`, or to be put there when its handling ends
        self._running: dict[K, float] = {}  # since when, on the loop's clock
        self._due: dict[K, float] = {}  # the truth about delayed keys; the heap may hold outdated entries
        self._heap: list[tuple[float, int, K]] = []
        self._order = 0
        self._failures: dict[K, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._log = _log.bind(queue=name)

    # -- what the owner sees ------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._ready)

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def delayed(self) -> int:
        """Keys that wait for their time."""
        return len(self._due)

    def longest_running_s(self) -> float:
        """Age of the oldest handling now going on."""
        if not self._running:
            return 0.0
        return asyncio.get_running_loop().time() - min(self._running.values())

    def add(self, key: K) -> None:
        """Handle `key` as soon as a worker is free; a pending delay or back-off of it is over."""
        if self._stopping:
            return
        self.stats.added += 1
        self._due.pop(key, None)
        self._enqueue(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Handle `key` in that time, or earlier if it is already due earlier."""
        if self._stopping:
            return
        if delay_s <= 0:
            self._enqueue(key)
            return
        if key in self._queued:
            return  # sooner than asked
        due = asyncio.get_running_loop().time() + delay_s
        if self._due.get(key, due + 1.0) <= due:
            return
        self._due[key] = due
        self._order += 1
        heapq.heappush(self._heap, (due, self._order, key))
        self._arm()

    def failures(self, key: K) -> int:
        """Failures of `key` in a row."""
        return self._failures.get(key, 0)

    async def run(self) -> None:
        """Work until stopped; raises nothing of the handler's."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work())
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    async def stop(self, timeout_s: float = 10.0) -> bool:
        """Take no more, let what is in flight end, end `run()`. False: something still ran after `timeout_s`."""
        self._stopping = True
        self._ready.clear()
        self._queued.clear()
        self._due.clear()
        self._heap.clear()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def drained(self) -> None:
        """Wait until nothing is queued or running; delayed keys do not count."""
        while self._ready or self._running:
            self._idle.clear()
            await self._idle.wait()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _enqueue(self, key: K) -> None:
        if key in self._queued:
            return
        self._queued.add(key)
        if key not in self._running:
            self._ready.append(key)
            self._wake.set()

    def _arm(self) -> None:
        """One timer, for the earliest delayed key."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        if self._timer is not None:
            if self._heap and self._timer.when() == self._heap[0][0]:
                return
            self._timer.cancel()
            self._timer = None
        if self._heap and not self._stopping:
            self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self._enqueue(key)
        self._arm()

    async def _work(self) -> None:
        while not self._stopping:
            if not self._ready:
                self._wake.clear()
                await self._wake.wait()
                continue
            key = self._ready.popleft()
            self._queued.discard(key)
            self._due.pop(key, None)
            self._running[key] = asyncio.get_running_loop().time()
            try:
                await self._one(key)
            finally:
                del self._running[key]
                if key in self._queued:
                    self._ready.append(key)
                    self._wake.set()
                if not self._running:
                    self._idle.set()

    async def _one(self, key: K) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                again_s = await self._handle(key)
        except NotLeaderError:
            # The queue ends with its leadership. But a renewal that was under way when the fence fell may save that,
            # and a key forgotten in between would wait for the next resync.
            self.add_after(key, self._backoff_first_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something the handler awaited was cancelled, not we: a worker must outlive that.
            self._failed(key, RuntimeError("the handler was cancelled from within"))
        except Exception as error:
            self._failed(key, error)
        else:
            self.stats.done += 1
            self._failures.pop(key, None)
            if again_s is not None:
                self.add_after(key, again_s)

    def _failed(self, key: K, error: Exception) -> None:
        self.stats.failed += 1
        self.stats.timed_out += isinstance(error, TimeoutError)
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        if isinstance(error, KubeError):
            if error.permanent:
                self.stats.gave_up += 1
                self._failures.pop(key, None)
                self._log.error("cannot succeed, waits for a change", key=str(key), error=str(error))
                return
            self._log.warning("failed, will try again", key=str(key), failures=failures, error=str(error))
        else:
            self._log.warning("failed, will try again", key=str(key), failures=failures, exc_info=error)
        wait_s = pause_s(failures, self._backoff_first_s, self._backoff_max_s)
        self.stats.retried += 1
        self.add_after(key, max(wait_s, getattr(error, "retry_after_s", 0.0)))
