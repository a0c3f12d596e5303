"""Answers that end before their end, by client or by engine: charged what was delivered, told apart, stopped."""

import asyncio
import contextlib
import json
import os
import signal
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, RawClient, bearer, chat, head
from tests.harness.gateway import (
    backend,
    endpoint,
    policy,
    quota,
    route,
    running_engine,
    running_gateway,
    sum_series,
    token,
    until,
)
from tests.harness.http2 import http2_request

LIMIT = 10**9
ALICE = bearer("sk-alice")
LONG = chat(stream=True, max_tokens=2000)
SLOW = {**LONG, "model": "slow"}
UNDER_WAY = 50
"""tokens that may be between engine and client when it leaves: five seconds of SLOW"""


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "4", "--allow-fault-headers") as one:
        yield one


@pytest.fixture(scope="module")
def slow():
    """Whose tokens are so far apart that a process that is held up loses only few of them."""
    with running_engine("--itl-ms", "100", model="slow") as one:
        yield one


@pytest.fixture(scope="module", params=["h2", "grpc_aio"])
def gateway(request, engine, slow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disconnects")
    text = policy(
        endpoint(),
        endpoint("slow", routeConfigs=[route("slow", 1)]),
        backend("slow", slow.address),
        quota("budget", total=LIMIT),
        token("alice", "sk-alice", ("qwen-7b", "slow"), rates={"tpm": LIMIT}, quota="budget"),
    )
    with running_gateway(folder, text, [engine], "--transport", request.param) as one:
        yield one


def asking(fault=""):
    return {**ALICE, "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}


async def charged(gateway, session) -> float:
    return sum_series(await gateway.metrics(session), "gateway_quota_usage")


async def idle(engine, session) -> None:
    """Until the engine runs nothing: it would otherwise go on for seconds."""
    async with asyncio.timeout(60):
        while await engine.counter(session, "vllm:num_requests_running"):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def read_events(answer, count: int) -> None:
    seen = 0
    async for line in answer.content:
        seen += line.startswith(b"data: ")
        if seen == count:
            return


@pytest.mark.parametrize("events", [1, 2, 6])
async def test_client_that_leaves_pays_for_what_it_got(gateway, slow, session, events):
    before, generated = await charged(gateway, session), await slow.counter(session, "vllm:generation_tokens_total")
    headers = asking()
    async with session.post(gateway.url + CHAT, json=SLOW, headers=headers) as answer:
        await read_events(answer, events)
        answer.close()
    row = await gateway.row_of(headers["x-request-id"])
    await idle(slow, session)
    generated = await slow.counter(session, "vllm:generation_tokens_total") - generated
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    assert row["prompt_tokens"] > 0
    # The first event is the role's. What came after the client's last event was delivered to its socket.
    assert events - 1 <= row["completion_tokens"] <= generated
    assert generated - row["completion_tokens"] <= UNDER_WAY
    assert generated < 300
    assert await charged(gateway, session) - before == row["prompt_tokens"] + row["completion_tokens"]


async def test_http2_client_that_resets_its_stream_pays_for_what_it_got(gateway, slow, session):
    headers = {**asking(), "content-type": "application/json"}
    body = json.dumps(SLOW).encode()
    got = await http2_request(gateway.url, CHAT, headers, body, reset_after_bytes=1000)
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    count = got.body.count(b"data: ")
    assert count >= 3
    assert count - 1 <= row["completion_tokens"] <= count + UNDER_WAY
    await idle(slow, session)


async def test_client_that_leaves_before_the_answer_begins(gateway, engine, session):
    before = await charged(gateway, session)
    headers = asking("hold")
    asked = asyncio.create_task(session.post(gateway.url + CHAT, json=chat(), headers=headers))
    await gateway.until_metric(session, "arks_open_streams", lambda admitted: admitted == 1)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    assert (row["completion_tokens"], row["ttft_ms"]) == (0, None)
    assert row["prompt_tokens"] > 0
    assert await charged(gateway, session) - before == row["prompt_tokens"]


async def test_client_that_leaves_with_its_body_half_sent_is_charged_nothing(gateway, engine, session):
    await gateway.until_metric(session, "arks_open_streams", lambda admitted: admitted == 0)
    before, started = await charged(gateway, session), gateway.streams("started")
    headers = asking()
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, {**headers, "Content-Length": "1000"}) + b'{"model"')
        await until(lambda: gateway.streams("started") > started)
    await until(lambda: gateway.streams("closed") == gateway.streams("started"))
    # extproc has heard of the end before whatever it is asked next, and rows are written in their order.
    after = asking()
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=after) as answer:
        assert answer.status == 200
    row = await gateway.row_of(after["x-request-id"])
    assert gateway.count(headers["x-request-id"]) == 0
    assert await charged(gateway, session) - before == row["prompt_tokens"] + row["completion_tokens"]


async def test_client_that_leaves_a_silent_stream(gateway, engine, session):
    headers = asking("stall_after_chunks=5")
    async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
        await read_events(answer, 6)
        answer.close()
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["completion_tokens"]) == (499, "client_disconnected", 5)
    await idle(engine, session)


async def test_client_that_closes_right_after_the_end_pays_exactly(gateway, engine, session):
    headers = asking()
    async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=9), headers=headers) as answer:
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                break
        answer.close()
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["completion_tokens"], row["accuracy"]) == (9, "exact")


async def cut_short(gateway, session, headers) -> bytes | None:
    """Ask for a stream that the engine resets: what came of it. None: it did so before Envoy had sent anything, and
    Envoy could still say 502.
    """
    body = b""
    async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
        if answer.status == 502:
            assert (await answer.json())["error"]["code"] == "engine_broken"
            return None
        assert answer.status == 200
        try:
            async for piece in answer.content.iter_any():
                body += piece
        except aiohttp.ClientPayloadError:
            return body
        raise AssertionError("it was not cut")


@pytest.mark.parametrize("chunks", [0, 1, 17])
async def test_engine_that_resets_its_stream_is_not_taken_for_a_client_that_left(gateway, engine, session, chunks):
    before = await charged(gateway, session)
    headers = asking(f"reset_after_chunks={chunks}")
    body = await cut_short(gateway, session, headers)
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (502, "engine_lost", "estimated")
    # Without the role's event. A busy Envoy reads the last chunks together with the reset, and passes them no more on.
    got = max(0, body.count(b"data: ") - 1) if body else 0
    assert got <= row["completion_tokens"] <= chunks
    assert await charged(gateway, session) - before == row["prompt_tokens"] + row["completion_tokens"]


def logged(gateway) -> int:
    """Entries for extproc that Envoy has written so far."""
    return sum(gateway.stats("grpc_access_log.logs_written").values())


async def test_reason_that_comes_before_the_end_of_its_stream_is_not_lost(gateway, session):
    """The access log has a connection of its own: a gateway that was held up reads the two in any order."""
    for _ in range(4):
        headers = asking("reset_after_chunks=17")
        before = logged(gateway)
        async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
            await read_events(answer, 2)
            os.kill(gateway.extproc_pid, signal.SIGSTOP)
            try:
                await until(lambda: logged(gateway) > before)  # noqa: B023 - asked at once
                await asyncio.sleep(0.3)  # Envoy sends what it has logged every 100 ms, and no counter tells when
            finally:
                os.kill(gateway.extproc_pid, signal.SIGCONT)
            answer.close()
        row = await gateway.row_of(headers["x-request-id"])
        assert (row["status"], row["error"]) == (502, "engine_lost")


async def test_engine_that_breaks_off_streams_but_lives_stays_open_to_all(gateway, session):
    """Some request makes it reset: one tenant's doing is not to close the only engine to everybody."""
    for _ in range(8):
        headers = asking("reset_after_chunks=1")
        await cut_short(gateway, session, headers)
        await gateway.row_of(headers["x-request-id"])
        async with session.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=ALICE) as answer:
            assert answer.status == 200


async def test_requests_that_share_an_id_are_each_in_the_ledger(gateway, session):
    """Clients choose their ids; a careless one is not to lose, or merge, rows."""
    headers = asking()

    async def leave() -> None:
        async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
            await read_events(answer, 5)
            answer.close()

    async def stay() -> None:
        async with session.post(gateway.url + CHAT, json=chat(max_tokens=2), headers=headers) as answer:
            assert answer.status == 200
            await answer.read()

    await asyncio.gather(leave(), stay(), leave())
    request_id = headers["x-request-id"]
    await until(lambda: gateway.count(request_id) == 3)
    rows = [row for row in gateway.usage() if row["request_id"] == request_id]
    assert sorted(row["status"] for row in rows) == [200, 499, 499]
    assert len({row["id"] for row in rows}) == 3


async def test_nothing_is_left_open_after_all_of_these(gateway, session):
    async with asyncio.timeout(60):
        while True:
            metrics = await gateway.metrics(session)
            names = ("arks_open_leases", "arks_open_streams", "arks_engine_in_flight")
            if not any(sum_series(metrics, name) for name in names):
                break
            await asyncio.sleep(0.05)
    rows = gateway.usage()
    assert len({(row["id"], row["attempt"]) for row in rows}) == len(rows)
    assert sum_series(metrics, "arks_leases_expired_total") == 0
