"""Keeps processes running: a part that dies is started again after a pause; one that keeps dying ends everything.

A part that dies while it is first started is a failure at once: the same thing would happen again.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from arks.errors import PartFailed
from arks.process import Child

log = structlog.get_logger()

RESTARTS = 3
WINDOW_S = 60.0
"""more than RESTARTS deaths within it are a failure"""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


class Part:
    """A supervised process: `launch` starts it (again) and returns once it serves.

    A `launch` that raises PartFailed leaves no process behind.
    """

    def __init__(self, name: str, launch: Callable[[], Awaitable[Child]]) -> None:
        self.name = name
        self.child: Child | None = None
        self._launch = launch
        self._deaths: deque[float] = deque()

    async def start(self) -> None:
        """Raises PartFailed where it cannot serve."""
        self.child = await self._launch()

    async def keep(self) -> None:
        """Runs until cancelled; raises PartFailed once the part has died too often."""
        assert self.child is not None, "start it first"
        pause_s = FIRST_PAUSE_S
        reason = ""
        while True:
            if not reason:
                status = await self.child.wait()
                reason = f"{ending(status)}{quoted(self.child)}"
            now = time.monotonic()
            self._deaths.append(now)
            while self._deaths[0] < now - WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) > RESTARTS:
                raise PartFailed(f"{self.name} died {len(self._deaths)} times within {WINDOW_S:.0f} s; {reason}")
            pause_s = FIRST_PAUSE_S if len(self._deaths) == 1 else min(pause_s * 2, LONGEST_PAUSE_S)
            log.warning("a part died, starting it again", part=self.name, reason=reason, pause_s=pause_s)
            await asyncio.sleep(pause_s)
            try:
                self.child = await self._launch()
            except PartFailed as error:
                reason = str(error)
                continue
            reason = ""
            log.info("a part is back", part=self.name, pid=self.child.pid)


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"


def quoted(child: Child) -> str:
    words = child.last_words()
    return f". Its last words:\n{words}" if words else ""
