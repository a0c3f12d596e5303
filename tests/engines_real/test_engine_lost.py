"""An engine that dies or is told to stop: what its streams, the next requests and the ledger see. An engine of its own,
without --enable-prompt-tokens-details, which also shows what then is not known.
"""

import asyncio
import signal
import time

import aiohttp
import pytest

from tests.engines_real.client import CHAT, MESSAGES, Client, body_for, chat
from tests.engines_real.conftest import POLICY
from tests.engines_real.process import free_port, generating, running_vllm
from tests.harness.gateway import running_gateway

LONG = "The gateway counts every token that an engine reads and writes. " * 12


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def own_gateway(made, port, tmp_path_factory):
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [f"http://127.0.0.1:{port}"]) as one:
        yield one


@pytest.fixture
def own_client(own_gateway, session) -> Client:
    return Client(session, own_gateway.url, "sk-alice")


async def refused_within_s(client: Client, timeout_s: float = 5.0, *, dying: frozenset[int] = frozenset()) -> float:
    """Until a new request gets our 503; each answer before must be one of ours, too, or of the engine's `dying`."""
    start = time.monotonic()
    while True:
        answer = await client.ask(CHAT, chat(max_tokens=1))
        if answer.status == 503 and answer.json["error"]["code"] == "no_healthy_engine":
            return time.monotonic() - start
        assert answer.status in {502, 503, *dying}, answer
        assert time.monotonic() - start < timeout_s, answer
        await asyncio.sleep(0.05)


async def test_engine_lost_and_found(own_gateway, own_client: Client, port, tmp_path, session):
    """One engine's deaths and return, in order: each start takes its time."""
    with running_vllm(tmp_path / "first", "chat", ("tiny-chat",), *generating(), port=port) as engine:
        await served_within_s(own_client)
        async with own_client.stream(CHAT, chat(max_tokens=3000, ignore_eos=True, stream=True)) as (lost, events):
            for _ in range(20):
                await anext(events)
            engine.kill()
            with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
                await until_done(events)
    row = await own_gateway.row_of(lost)
    assert (row["status"], row["error"], row["accuracy"]) == (502, "engine_lost", "estimated")
    assert row["completion_tokens"] >= 15
    assert await refused_within_s(own_client) < 5
    assert not (await own_gateway.ready(session))["checks"]["engines"]["ok"]

    with running_vllm(tmp_path / "second", "chat", ("tiny-chat",), *generating(), port=port) as engine:
        await served_within_s(own_client)
        await without_prompt_details(own_gateway, own_client)
        await told_to_stop(own_gateway, own_client, engine)


async def until_done(events) -> None:
    async for data in events:
        if data == "[DONE]":
            return


async def served_within_s(client: Client, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (answer := await client.ask(CHAT, chat(max_tokens=1))).status != 200:
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.1)


async def without_prompt_details(gateway, client: Client) -> None:
    """The prompt is known whole; what of it came from the cache is not told."""
    for stream in (False, True):
        for _ in range(2):
            answer = await client.ok(MESSAGES, body_for(MESSAGES, LONG, 5, stream=stream))
            row = await gateway.row_of(answer.request_id)
            told = answer.events[0]["message"]["usage"] if stream else answer.json["usage"]
            assert "cache_read_input_tokens" not in told
            assert row["prompt_tokens"] == told["input_tokens"] > 150
            assert (row["completion_tokens"], row["cached_tokens"], row["accuracy"]) == (5, 0, "exact")


async def told_to_stop(gateway, client: Client, engine) -> None:
    """vLLM on SIGTERM takes no more connections. Its streams it either ends in time, with the finish reason `abort`, a
    usage and [DONE]; or it leaves them open and silent, and clients must leave. Both have been seen, and neither is a
    success.
    """
    async with client.stream(CHAT, chat(max_tokens=3000, ignore_eos=True, stream=True)) as (request_id, events):
        for _ in range(10):
            await anext(events)
        engine.signal(signal.SIGTERM)
        # On connections that it has, it says 500: "cannot schedule new futures after shutdown".
        assert await refused_within_s(client, dying=frozenset({500})) < 5
    row = await gateway.row_of(request_id)
    assert (row["accuracy"], row["error"]) in {
        ("exact", "engine_error"),
        ("estimated", "client_disconnected"),
        ("estimated", "engine_lost"),
    }
    assert row["completion_tokens"] >= 8
