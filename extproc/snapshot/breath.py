"""Long work in a thread, without long waits for the event loop beside it.

A thread in Python code gives up the interpreter only every 5 ms (the switch interval), and in one C call not at all;
freeing ten thousand records at once is such a call.
"""

import time
from typing import Any, Final

_WORK_S: Final = 0.001
_REST_S: Final = 0.000_05


class Breath:
    """Call it often: once in a millisecond it lets others run."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def __call__(self) -> None:
        if time.perf_counter() - self._since > _WORK_S:
            time.sleep(_REST_S)
            self._since = time.perf_counter()


def let_go(records: list[Any]) -> None:
    """Free what only this list still holds, a little at a time. In a thread, not on the loop."""
    breath = Breath()
    while records:
        del records[-64:]
        breath()
