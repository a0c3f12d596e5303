"""How long the event loop made others wait: the one figure that tells of a pause, whatever caused it."""

import asyncio
import time
from typing import Final

PERIOD_S: Final = 0.01


class LoopLag:
    """Sleeps 10 ms again and again, and remembers how late it woke at worst. Costs about 0.1 % of a core."""

    def __init__(self) -> None:
        self._max_s = 0.0

    async def run(self) -> None:
        """For the life of the process."""
        while True:
            due = time.monotonic() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            self._max_s = max(self._max_s, time.monotonic() - due)

    def take_max_s(self) -> float:
        """The worst since the last call, seconds."""
        worst, self._max_s = self._max_s, 0.0
        return worst
