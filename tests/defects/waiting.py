"""Waiting for what another process tells when it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(
    look: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool] = bool, timeout_s: float = 60.0
) -> Any:
    """The first look that holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not holds(seen := await look()):  # noqa: ASYNC110 - nothing here could set an event
            await asyncio.sleep(0.03)
    return seen
