"""The comparison this folder is for: the ledger's tokens against the engine's own counters.

Both sides are read when the engine is idle and every request has its row. vLLM counts a prompt once per choice (`n`),
its `usage` and so the ledger once per prompt; a test that asks for choices tells `again`. Work for clients that left is
in the engine's counters and nowhere else: what the exact rows leave over is what estimated rows stand for.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.engines_real.process import Counts, Vllm
from tests.harness.gateway import Gateway, sum_series

QUIET_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Page:
    """What happened on one engine between two looks."""

    engine: Counts
    exact: list[dict[str, Any]]
    estimated: list[dict[str, Any]]
    again: int

    @property
    def unexplained(self) -> Counts:
        """The engine's counters less the exact rows: zero, or what the estimated rows stand for."""
        engine = self.engine
        return Counts(
            engine.prompt - self.again - total(self.exact, "prompt_tokens"),
            engine.generation - total(self.exact, "completion_tokens"),
            engine.cached - total(self.exact, "cached_tokens"),
        )


def total(rows: list[dict[str, Any]], column: str) -> int:
    return sum(int(row[column]) for row in rows)


@dataclass
class Books:
    """An engine behind a gateway, from the first request on."""

    engine: Vllm
    gateway: Gateway
    start: Counts = field(default_factory=lambda: Counts(0, 0, 0))
    rows_before: int = 0
    again: int = 0
    """prompt tokens that the engine counted once more than it told"""
    direct: Counts = field(default_factory=lambda: Counts(0, 0, 0))
    """asked without the gateway"""

    async def open(self, session: aiohttp.ClientSession) -> "Books":
        """From now on."""
        await self.quiet(session)
        self.start = await self.engine.counts(session)
        self.rows_before = len(self._rows())
        return self

    async def page(self, session: aiohttp.ClientSession) -> Page:
        """Everything since `open`."""
        await self.quiet(session)
        rows = self._rows()[self.rows_before :]
        kinds = {kind: [row for row in rows if row["accuracy"] == kind] for kind in ("exact", "estimated")}
        assert len(rows) == sum(map(len, kinds.values()))
        counts = await self.engine.counts(session) - self.start - self.direct
        return Page(counts, kinds["exact"], kinds["estimated"], self.again)

    def aside(self, prompt: int, generation: int) -> None:
        """A test has asked the engine directly: counted there, and rightly in no row."""
        self.direct = Counts(self.direct.prompt + prompt, self.direct.generation + generation, 0)

    async def quiet(self, session: aiohttp.ClientSession) -> None:
        """Until no request is open in the gateway or the engine, and every row is written."""
        async with asyncio.timeout(QUIET_TIMEOUT_S):
            seen = -1
            while True:
                metrics = await self.gateway.metrics(session)
                done = int(sum_series(metrics, "gateway_requests_total"))
                idle = not await self.engine.busy(session)
                # Twice the same: a request may be on its way between two looks.
                if idle and sum_series(metrics, "arks_engine_in_flight") == 0 and done == seen == len(self._rows()):
                    return
                seen = done
                await asyncio.sleep(0.1)

    def _rows(self) -> list[dict[str, Any]]:
        return self.gateway.usage()
