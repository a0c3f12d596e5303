"""Prober: asks every engine of the policy whether it is alive.

Any HTTP status below 500 is life, also 401 of a server that wants a key; a 404 moves on to the next path. A refused
connection or a 5xx is proof of the contrary, a timeout only the second time. Every probe is a connection of its own: a
server that is shutting down refuses new ones while its old ones still answer. Redirects are not followed.
"""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable

import aiohttp
import structlog

from extproc.picking.engine import Engine
from extproc.picking.model import HealthSettings

_NOT_FOUND = 404
_HELD_UP = "held up"
"""a timeout that says nothing about the engine: it came so late that we were not running ourselves"""
_HELD_UP_SHARE = 1.5
"""of the timeout"""


class Prober:
    """`run` owns all probes; cancelling it ends them."""

    def __init__(
        self,
        settings: HealthSettings,
        clock: Callable[[], float],
        rng: random.Random,
        on_answer: Callable[[Engine, int], None],
        on_failure: Callable[[Engine, str, bool], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._on_answer = on_answer
        self._on_failure = on_failure
        self._log = structlog.get_logger("picking")
        self._due: list[tuple[float, int, Engine]] = []
        self._number = itertools.count()
        self._changed = asyncio.Event()

    def watch(self, engine: Engine) -> None:
        """Begin to probe: at once, since a new engine is used at once."""
        self._schedule(engine, self._clock())

    def hurry(self, engine: Engine) -> None:
        """The engine went down: ask as soon as its ejection allows it to come back."""
        if not engine.probing:
            self._schedule(engine, max(self._clock(), engine.ejected_until_s))

    def doubt(self, engine: Engine) -> None:
        """It may be down: ask soon, but however many answers break off no more often than one that is."""
        soon_s = max(self._clock(), engine.asked_s + self._settings.down_interval_s, engine.ejected_until_s)
        if not engine.probing and soon_s < engine.due_s:
            self._schedule(engine, soon_s)

    async def run(self) -> None:
        settings = self._settings
        probes: set[asyncio.Task[None]] = set()

        def probe_ended(task: asyncio.Task[None]) -> None:
            # Only now is there room for another one.
            probes.discard(task)
            self._changed.set()

        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        try:
            async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
                while True:
                    self._changed.clear()
                    now_s = self._clock()
                    while self._due and self._due[0][0] <= now_s and len(probes) < settings.concurrency:
                        due_s, _, engine = heapq.heappop(self._due)
                        # An entry that was overtaken by a later decision, or whose engine has left, is dropped here.
                        if engine.known and not engine.probing and engine.due_s == due_s:
                            engine.probing = True
                            task = asyncio.create_task(self._probe(session, engine))
                            probes.add(task)
                            task.add_done_callback(probe_ended)
                    await self._until_next(full=len(probes) >= settings.concurrency)
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)

    async def _until_next(self, *, full: bool) -> None:
        wait_s = None
        if self._due and not full:
            wait_s = max(0.0, self._due[0][0] - self._clock())
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _probe(self, session: aiohttp.ClientSession, engine: Engine) -> None:
        epoch = engine.epoch
        try:
            reason, certain = await self._ask(session, engine)
            if not engine.known or reason == _HELD_UP:
                return
            if reason:
                self._on_failure(engine, reason, certain)
            else:
                self._on_answer(engine, epoch)
        except Exception:
            # A probe that breaks must not end the probing of this engine, nor of all others.
            self._log.exception("probe broke", engine=engine.address)
        finally:
            engine.probing = False
            engine.asked_s = self._clock()
            if engine.known:
                self._schedule(engine, self._next_s(engine, epoch))

    async def _ask(self, session: aiohttp.ClientSession, engine: Engine) -> tuple[str, bool]:
        """Why the engine is not alive, and whether that is certain; an empty reason: it is alive."""
        paths = self._settings.paths
        for _ in paths:
            path = paths[engine.path_index % len(paths)]
            asked_s = self._clock()
            try:
                async with session.get(f"http://{engine.address}{path}", allow_redirects=False) as response:
                    status = response.status
            except TimeoutError:
                # The answer may lie here unread.
                held_up = self._clock() - asked_s > _HELD_UP_SHARE * self._settings.timeout_s
                return _HELD_UP if held_up else "timeout", False
            except aiohttp.ClientConnectorError:
                return "refused", True
            except (aiohttp.ClientError, OSError, ValueError):
                return "broken", True
            if status >= 500:
                return f"status_{status}", True
            if status != _NOT_FOUND:
                return "", False
            engine.path_index += 1
        return "", False

    def _next_s(self, engine: Engine, epoch: int) -> float:
        settings = self._settings
        now_s = self._clock()
        if engine.epoch != epoch and not engine.usable and now_s >= engine.ejected_until_s and not engine.silent:
            # It went down while this probe was under way, whose answer could therefore not count.
            return now_s
        interval_s = settings.down_interval_s
        if engine.usable and not engine.silent:
            interval_s = max(settings.interval_s, len(self._due) / settings.probes_per_s)
        interval_s *= 1 + settings.jitter * (2 * self._rng.random() - 1)
        return max(now_s + interval_s, engine.ejected_until_s if not engine.usable else 0.0)

    def _schedule(self, engine: Engine, due_s: float) -> None:
        engine.due_s = due_s
        heapq.heappush(self._due, (due_s, next(self._number), engine))
        self._changed.set()
