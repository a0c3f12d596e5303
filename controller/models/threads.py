"""Blocking work beside the event loop, which nobody closes a file under."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(stop: Callable[[], None], work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Cancelled, it calls ``stop``, and ends when the thread did: what the thread uses may be closed then."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # told to nobody, as who asked is gone
        raise
