"""Ask engines how busy they are, gently: vLLM's event loop pays 5 ms for each look at its metrics.

SGLang's /v1/loads is tried first (2 Hz), then /metrics (1 Hz); what answers is remembered. An engine is dead when it
refuses or stays silent `_LOSSES` times in a row; one that answers without figures (a router, another server) is
healthy, and looked for figures again now and then. Bounded: connections, time, size of an answer, looks per sweep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Final

from controller.weights.http import get
from controller.weights.metrics import Sample, from_loads, from_page
from controller.weights.model import EngineLoad

LOADS, METRICS = "/v1/loads", "/metrics"
TIMEOUT_S: Final = 1.0
CONCURRENCY: Final = 32
MOST_BYTES: Final = 2 << 20
PERIODS_S: Final = {LOADS: 0.5, METRICS: 1.0, "": 30.0}
"""between two looks, by what answers; "": nothing that we understand"""
LOOKS_PER_SWEEP: Final = 50
"""of more engines, those that have waited longest: each is looked at less often, and the looks stay spread out"""
_LOSSES: Final = 3
_TTFT_ALPHA: Final = 0.3
_TTFT_KEPT_S: Final = 30.0
"""without a new first token, the old ones' time says nothing any more"""


class _Target:
    __slots__ = ("counted", "due_s", "load", "losses", "path", "ttft_at_s", "ttft_s")

    def __init__(self, address: str) -> None:
        self.load = EngineLoad(address, healthy=True, known=False)
        self.path = LOADS
        self.due_s = 0.0
        self.losses = 0
        self.counted: Sample | None = None
        self.ttft_s = self.ttft_at_s = 0.0


class Scraper:
    """`await scraper.sweep(addresses)`, every half second or so."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.loads: dict[str, EngineLoad] = {}
        self.looks = 0
        self._targets: dict[str, _Target] = {}
        self._clock, self._timeout_s = clock, timeout_s
        self._gate = asyncio.Semaphore(CONCURRENCY)

    async def sweep(self, addresses: Iterable[str]) -> dict[str, EngineLoad]:
        """Look at those that are due; the load of all. Others than these are forgotten."""
        wanted = set(addresses)
        for address in self._targets.keys() - wanted:
            del self._targets[address]
        for address in wanted - self._targets.keys():
            self._targets[address] = _Target(address)
        now = self._clock()
        due = [target for target in self._targets.values() if target.due_s <= now]
        due.sort(key=attrgetter("due_s"))
        del due[LOOKS_PER_SWEEP:]
        for target in due:
            target.due_s = now + PERIODS_S[target.path] - 0.05
        await asyncio.gather(*(self._look(target) for target in due))
        self.loads = {address: target.load for address, target in self._targets.items()}
        return self.loads

    async def _look(self, target: _Target) -> None:
        for path in (METRICS,) if target.path == METRICS else (LOADS, METRICS):
            answer = await self._get(target, path)
            if answer is None:
                return
            status, body = answer
            sample = None
            if status == 200:
                sample = from_loads(body) if path == LOADS else from_page(body)
            if sample is not None:
                target.path = path
                self._take(target, sample)
                return
            if status >= 500:
                break  # what it would say when it is well is not known
        else:
            target.path = ""
        target.load = EngineLoad(target.load.address, healthy=True, known=False)

    async def _get(self, target: _Target, path: str) -> tuple[int, bytes] | None:
        self.looks += 1
        try:
            async with self._gate, asyncio.timeout(self._timeout_s):
                answer = await get(target.load.address, path, MOST_BYTES)
        except (OSError, ValueError):
            target.losses += 1
            target.due_s = 0.0  # before all who wait: whether it is dead shall be known soon
            if target.losses >= _LOSSES:
                target.load = EngineLoad(target.load.address, healthy=False)
                target.counted, target.path = None, LOADS  # another engine may come back there
                target.due_s = self._clock() + 1.0
            return None
        target.losses = 0
        return answer

    def _take(self, target: _Target, sample: Sample) -> None:
        before, target.counted = target.counted, sample
        now = self._clock()
        if before is not None and sample.ttft_count > before.ttft_count and sample.ttft_sum_s >= before.ttft_sum_s:
            mean_s = (sample.ttft_sum_s - before.ttft_sum_s) / (sample.ttft_count - before.ttft_count)
            known = target.ttft_s > 0
            target.ttft_s = target.ttft_s + _TTFT_ALPHA * (mean_s - target.ttft_s) if known else mean_s
            target.ttft_at_s = now
        elif now - target.ttft_at_s > _TTFT_KEPT_S:
            target.ttft_s = 0.0
        target.load = EngineLoad(
            target.load.address, True, True, sample.running, sample.waiting, sample.kv_usage, target.ttft_s
        )
