"""An extproc that ends at its drain's timeout, and its successor: no answer under way is cut, and all is charged."""

import asyncio
import contextlib
import os
import signal
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, RawClient, bearer, chat, contents, events, head
from tests.harness.gateway import Gateway, endpoint, policy, running_engine, running_gateway, token, until

POLICY = policy(endpoint(), token("alice", "sk-alice", rates={"tpm": 10**9}))
CHUNKS = 200


@pytest.fixture
def engine():
    with running_engine("--itl-ms", "5", "--allow-fault-headers", "--record", "100") as one:
        yield one


@pytest.fixture
def gateway(request, engine, tmp_path):
    flags = ("--transport", getattr(request, "param", "h2"), "--drain-timeout-s", "0.3")
    with running_gateway(tmp_path, POLICY, [engine], *flags) as one:
        yield one


def asking(fault: str = "") -> dict[str, str]:
    return {**bearer("sk-alice"), "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}


async def replaced(gateway: Gateway) -> None:
    """SIGTERM, and wait until another one stands in its place."""
    old = gateway.extproc_pid
    os.kill(old, signal.SIGTERM)
    await until(lambda: gateway.find_children() or gateway.extproc_pid != old)


def is_whole(body: bytes) -> bool:
    said = [event for event in contents(body) if any(choice["delta"].get("content") for choice in event["choices"])]
    return events(body)[-1] == "[DONE]" and len(said) == CHUNKS


async def said(answer, count: int) -> bytes:
    """The answer's beginning, up to so many events."""
    body = b""
    while body.count(b"data: ") < count:
        body += await answer.content.readany()
    return body


@pytest.mark.parametrize("gateway", ["h2", "grpc_aio"], indirect=True)
async def test_a_stream_goes_on_to_its_end(gateway, engine, session):
    headers = asking()
    sent = chat(stream=True, max_tokens=CHUNKS)
    async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
        body = await said(answer, 5)
        engine.signal(signal.SIGSTOP)  # or on a busy machine the stream would be over before
        await replaced(gateway)
        engine.signal(signal.SIGCONT)
        body += await answer.read()
    assert is_whole(body)
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["accuracy"], row["error"]) == (200, "estimated", "gateway_restarted")
    assert 0 < row["completion_tokens"] < CHUNKS
    assert not gateway.ext_proc_faults()


async def test_streams_whose_chunks_are_under_way_lose_none(gateway, session):
    """No pause between chunks and events cut in two: at any moment some are at extproc and some on their way."""
    begun = asyncio.Barrier(21)

    async def one() -> bytes:
        headers = asking("cut_every_bytes=150")
        sent = chat(stream=True, max_tokens=CHUNKS)
        async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
            body = await said(answer, 2)
            await begun.wait()
            return body + await answer.read()

    asked = [asyncio.create_task(one()) for _ in range(20)]
    await begun.wait()
    await replaced(gateway)
    assert all(map(is_whole, await asyncio.gather(*asked)))


async def test_an_answer_that_has_not_begun_comes(gateway, engine, session):
    headers = asking("hold")
    sent = chat(max_tokens=5)
    asked = asyncio.create_task(session.post(gateway.url + CHAT, json=sent, headers=headers))
    held: list[dict[str, object]] = []
    async with asyncio.timeout(60):
        while not held:
            held = await engine.recorded(session)
            await asyncio.sleep(0.02)
    await replaced(gateway)
    await engine.faults(session)
    async with await asked as answer:
        assert answer.status == 200
        assert (await answer.json())["usage"]["completion_tokens"] == 5
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["accuracy"], row["error"]) == (0, "estimated", "gateway_restarted")
    assert (row["prompt_tokens"] > 0, row["completion_tokens"]) == (True, 0)


async def test_a_request_that_was_not_admitted_does_not_pass(gateway, engine, session):
    gateway.tolerated |= {"streams_failed"}
    started = gateway.streams("started")
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, {**asking(), "Content-Length": "1000"}) + b'{"model"')
        await until(lambda: gateway.streams("started") > started)
        answer = asyncio.create_task(client.answer())  # Envoy closes soon after it
        await replaced(gateway)
        with contextlib.suppress(ConnectionError):
            await client.send(b" " * 992)
        assert (await answer).status >= 500
    assert not await engine.recorded(session)


async def test_the_successor_serves(gateway, session):
    await replaced(gateway)

    gateway.tolerated |= {"streams_failed"}
    async with asyncio.timeout(60):
        while True:
            async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=asking()) as answer:
                if answer.status == 200:
                    break
            await asyncio.sleep(0.1)


async def test_gzip_that_is_unpacked_on_its_way_is_cut_rather_than_garbled(gateway, engine, session):
    gateway.tolerated |= {"streams_failed"}
    async with session.post(
        gateway.url + CHAT, json=chat(stream=True, max_tokens=4 * CHUNKS), headers=asking("gzip=1")
    ) as answer:
        await answer.content.readany()
        engine.signal(signal.SIGSTOP)
        await replaced(gateway)
        engine.signal(signal.SIGCONT)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
