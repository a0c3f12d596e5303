"""One gateway for the folder, asked by the SDKs that users have. Only the time they sleep is replaced."""

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.harness.gateway import (
    Engine,
    Gateway,
    backend,
    endpoint,
    past_midnight,
    policy,
    quota,
    route,
    running_engine,
    running_gateway,
    token,
)

MODEL = "qwen-7b"
MESSAGES = [{"role": "user", "content": "Say something that takes a moment, and not too little of it."}]
TIMEOUT_S = 120.0

POLICY = policy(
    endpoint(MODEL),
    endpoint("secluded"),
    endpoint("off", routeConfigs=[route("nowhere", 0)]),
    endpoint("dead", routeConfigs=[route("nowhere", 1)]),
    backend("nowhere", "127.0.0.1:9"),
    quota("tiny", total=10),
    token("good", "sk-good", (MODEL, "off", "dead")),
    token("expired", "sk-expired", expiresAt="2020-01-01T00:00:00Z"),
    token("a-minute", "sk-a-minute", rates={"tpm": 1}),
    token("a-day", "sk-a-day", rates={"rpd": 0}),
    token("spent", "sk-spent", quota="tiny"),
    token("unquoted", "sk-unquoted", quota="no-such-quota"),
    token("single", "sk-single", maxConcurrentRequests=1),
)


@pytest.fixture(autouse=True)
def within_one_day() -> None:
    """Daily limits begin anew at midnight (UTC)."""
    past_midnight()


@pytest.fixture(autouse=True)
def engine_is_fit(engine, gateway) -> None:
    """One that a test before had lost comes back with its next probe."""
    wanted = f'arks_engine_healthy{{engine="{engine.address}"}} 1.0'
    end = time.monotonic() + 60
    while wanted not in urllib.request.urlopen(f"{gateway.admin}/metrics").read().decode():
        assert time.monotonic() < end, "the engine stays away"
        time.sleep(0.02)


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    flags = ("--itl-ms", "1", "--allow-fault-headers", "--prefix-cache", "--prompt-tokens-details")
    with running_engine(*flags, model=MODEL) as one:
        yield one


@pytest.fixture(scope="package")
def gateway(engine, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("clients"), POLICY, [engine]) as one:
        yield one


class Clients:
    """SDK clients of the gateway; each is closed with the test."""

    def __init__(self, gateway: Gateway, stack: AsyncExitStack) -> None:
        self._gateway = gateway
        self._stack = stack

    async def openai(self, secret: str = "sk-good", **options: Any) -> AsyncOpenAI:
        options = {"max_retries": 0, "timeout": TIMEOUT_S, **options}
        return await self._stack.enter_async_context(
            AsyncOpenAI(base_url=self._gateway.url + "/v1", api_key=secret, **options)
        )

    async def anthropic(self, secret: str = "sk-good", **options: Any) -> AsyncAnthropic:
        options = {"max_retries": 0, "timeout": TIMEOUT_S, "api_key": secret, **options}
        return await self._stack.enter_async_context(AsyncAnthropic(base_url=self._gateway.url, **options))


@pytest.fixture
async def clients(gateway, monkeypatch) -> AsyncIterator[Clients]:
    # What a developer's own environment says about the real services must not reach the gateway.
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncExitStack() as stack:
        yield Clients(gateway, stack)


@pytest.fixture
async def openai(clients) -> AsyncOpenAI:
    return await clients.openai()


@pytest.fixture
async def anthropic(clients) -> AsyncAnthropic:
    return await clients.anthropic()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """For the engine's own switches."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as one:
        yield one


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """For how long an SDK would have waited before each of its retries; it waits no time here."""
    found: list[float] = []

    async def at_once(delay_s: float) -> None:
        found.append(delay_s)
        await asyncio.sleep(0)

    monkeypatch.setattr("anyio.sleep", at_once)
    return found


async def booked(gateway: Gateway, request_id: str | None) -> tuple[int, int, int]:
    """Prompt, completion and cached tokens of the request's one row, which must be exact and without a fault."""
    assert request_id
    row = await gateway.row_of(request_id)
    assert (row["accuracy"], row["error"], row["status"]) == ("exact", "", 200), row
    return row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]
