"""Answers that end before their end: who ended them, what is charged, and what the ledger says."""

import asyncio
import contextlib

import aiohttp
import pytest

from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token

POLICY = policy(endpoint(), token("alice", "sk-alice", rates={"tpm": 10**9}))
ALICE = {"Authorization": "Bearer sk-alice"}
LONG = {"model": "qwen-7b", "stream": True, "max_tokens": 2000, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def engine():
    with running_engine("--itl-ms", "5", "--allow-fault-headers") as one:
        yield one


@pytest.fixture
def gateway(engine, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as one:
        yield one


@pytest.fixture
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as one:
        yield one


async def test_client_that_leaves_pays_for_what_it_got(gateway, engine, session):
    async with session.post(f"{gateway.url}/v1/chat/completions", json=LONG, headers=ALICE) as answer:
        events = 0
        async for line in answer.content:
            events += line.startswith(b"data: ")
            if events == 21:  # the role's event, and twenty tokens
                break
        answer.close()
    row = (await gateway.rows(1))[0]
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    async with asyncio.timeout(60):
        while await engine.counter(session, "vllm:num_requests_running"):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
    generated = await engine.counter(session, "vllm:generation_tokens_total")
    assert 20 <= row["completion_tokens"] <= generated < LONG["max_tokens"]


async def test_engine_that_dies_is_not_taken_for_a_client_that_left(gateway, engine, session):
    async with session.post(f"{gateway.url}/v1/chat/completions", json=LONG, headers=ALICE) as answer:
        await answer.content.readline()
        engine.kill()
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    row = (await gateway.rows(1))[0]
    assert (row["status"], row["error"], row["accuracy"]) == (502, "engine_lost", "estimated")


async def test_client_that_leaves_before_the_answer_begins(gateway, session):
    held = {**ALICE, "x-sim-fault": "hold"}
    plain = {**LONG, "stream": False}
    asked = asyncio.create_task(session.post(f"{gateway.url}/v1/chat/completions", json=plain, headers=held))
    await gateway.until_metric(session, "arks_open_streams", lambda admitted: admitted == 1)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    row = (await gateway.rows(1))[0]
    assert (row["status"], row["error"], row["completion_tokens"]) == (499, "client_disconnected", 0)
    assert row["prompt_tokens"] > 0
