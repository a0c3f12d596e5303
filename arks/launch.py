"""Starting a child process and knowing when it serves; a start that fails leaves nothing behind."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp

from arks.errors import PartFailed
from arks.process import Child
from arks.supervision import ending, quoted

START_TIMEOUT_S = 30.0
"""for each part to serve"""
POLL_S = 0.05
STOP_TIMEOUT_S = 5.0
"""between SIGTERM and SIGKILL, for parts that have nothing left to finish"""


@contextlib.asynccontextmanager
async def or_stopped(child: Child) -> AsyncIterator[None]:
    """A launch that fails, or is cancelled, leaves no process behind."""
    try:
        yield
    except BaseException as error:
        child.signal(signal.SIGTERM)
        await asyncio.shield(child.stop(STOP_TIMEOUT_S))
        if isinstance(error, TimeoutError | ValueError | KeyError):
            raise PartFailed(f"{child.name} did not start: no ready line{quoted(child)}") from error
        raise


async def spawn(name: str, command: list[str], *, says_ready: bool = False) -> Child:
    try:
        return await Child.start(name, command, says_ready=says_ready)
    except OSError as error:
        raise PartFailed(f"{name} cannot be run: {error.strerror}: {command[0]}") from error


async def until(child: Child, otherwise: str, holds: Callable[[], Awaitable[bool]]) -> None:
    """Poll until it holds. Raises PartFailed where the child ends before, or it takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not await holds():
        if not child.alive():
            raise PartFailed(f"{child.name} did not start: {ending(await child.wait())}{quoted(child)}")
        if time.monotonic() > deadline:
            raise PartFailed(f"{child.name} did not start within {START_TIMEOUT_S:.0f} s: {otherwise}{quoted(child)}")
        await asyncio.sleep(POLL_S)


async def status_is(session: aiohttp.ClientSession, url: str, wanted: set[int]) -> bool:
    try:
        async with session.get(url) as answer:
            await answer.read()
            return answer.status in wanted
    except (aiohttp.ClientError, TimeoutError):
        return False
