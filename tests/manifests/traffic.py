"""Clients that ask without pause, and keep what every request met."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Self

import aiohttp

from tests.manifests.platform import Platform
from tests.manifests.tenant import secret_of

PAUSE_S = 0.01
TIMEOUT_S = 90.0


class Answer(NamedTuple):
    status: int
    """0: there was none"""
    engine: str
    """the pod that answered; where none did, why"""

    @property
    def application(self) -> str:
        return self.engine.partition("-")[0]


class Traffic:
    """`async with Traffic(platform, "rich", "chat") as flow:` has flowed as long as the block.

    With one client the answers are in the order of the requests.
    """

    def __init__(self, platform: Platform, token: str, model: str, *, clients: int = 1) -> None:
        self.answers: list[Answer] = []
        self._platform, self._model, self._clients = platform, model, clients
        self._headers = {"Authorization": f"Bearer {secret_of(token)}"}
        self._more = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        session = await self._stack.enter_async_context(self._platform.session())
        tasks = [asyncio.create_task(self._ask_on(session)) for _ in range(self._clients)]
        self._stack.push_async_callback(_ended, tasks)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until enough of the answers, or something beside them, are so. It is asked at every answer."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not holds():
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"never {what}: {self.statuses}; last {self.answers[-5:]}") from None

    async def until_last(self, count: int, each: Callable[[Answer], bool], what: str) -> None:
        """Wait until so many answers in a row, from now on, are so."""
        began = len(self.answers)
        await self.until(
            lambda: len(self.answers) - began >= count and all(each(answer) for answer in self.answers[-count:]), what
        )

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    @property
    def statuses(self) -> list[tuple[int, int]]:
        """Status and number of each run of the same."""
        return [(status, len(list(run))) for status, run in groupby(answer.status for answer in self.answers)]

    def applications(self, last: int) -> Counter[str]:
        return Counter(answer.application for answer in self.answers[-last:])

    async def _ask_on(self, session: aiohttp.ClientSession) -> None:
        body = {"model": self._model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        while True:
            self.answers.append(await _answer(session, body, self._headers))
            self._more.set()
            await asyncio.sleep(PAUSE_S)


async def _answer(session: aiohttp.ClientSession, body: Any, headers: dict[str, str]) -> Answer:
    try:
        async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status == 200:
                return Answer(200, (await answer.json())["model"])
            return Answer(answer.status, await answer.text())
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(0, repr(error))


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
