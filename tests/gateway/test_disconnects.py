"""Answers that end before their end, by client or by engine: charged what was delivered, told apart, stopped."""

import asyncio
import json
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, RawClient, bearer, chat, head
from tests.harness.gateway import endpoint, policy, quota, running_engine, running_gateway, sum_series, token, until
from tests.harness.http2 import http2_request

LIMIT = 10**9
POLICY = policy(
    endpoint(), quota("budget", total=LIMIT), token("alice", "sk-alice", rates={"tpm": LIMIT}, quota="budget")
)
ALICE = bearer("sk-alice")
LONG = chat(stream=True, max_tokens=2000)


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "4", "--allow-fault-headers") as one:
        yield one


@pytest.fixture(scope="module", params=["h2", "grpc_aio"])
def gateway(request, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disconnects")
    with running_gateway(folder, POLICY, [engine], "--transport", request.param) as one:
        yield one


def asking(fault=""):
    return {**ALICE, "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}


async def charged(gateway, session) -> float:
    return sum_series(await gateway.metrics(session), "gateway_quota_usage")


async def idle(engine, session) -> None:
    """Until the engine runs nothing: it would otherwise go on for seconds."""
    async with asyncio.timeout(5):
        while await engine.counter(session, "vllm:num_requests_running"):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def read_events(answer, count: int) -> None:
    seen = 0
    async for line in answer.content:
        seen += line.startswith(b"data: ")
        if seen == count:
            return


@pytest.mark.parametrize("events", [1, 2, 30])
async def test_client_that_leaves_pays_for_what_it_got(gateway, engine, session, events):
    before, generated = await charged(gateway, session), await engine.counter(session, "vllm:generation_tokens_total")
    headers = asking()
    async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
        await read_events(answer, events)
        answer.close()
    row = await gateway.row_of(headers["x-request-id"])
    await idle(engine, session)
    generated = await engine.counter(session, "vllm:generation_tokens_total") - generated
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    assert row["prompt_tokens"] > 0
    # The first event is the role's. What came after the client's last event was delivered to its socket.
    assert events - 1 <= row["completion_tokens"] <= generated
    assert generated - row["completion_tokens"] <= 25
    assert generated < 300
    assert await charged(gateway, session) - before == row["prompt_tokens"] + row["completion_tokens"]


async def test_http2_client_that_resets_its_stream_pays_for_what_it_got(gateway, engine, session):
    headers = {**asking(), "content-type": "application/json"}
    body = json.dumps(LONG).encode()
    got = await http2_request(gateway.url, CHAT, headers, body, reset_after_bytes=3000)
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    assert got.body.count(b"data: ") - 1 <= row["completion_tokens"] <= got.body.count(b"data: ") + 25
    await idle(engine, session)


async def test_client_that_leaves_before_the_answer_begins(gateway, engine, session):
    before = await charged(gateway, session)
    headers = asking("first_byte_delay_ms=10000")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), session.post(gateway.url + CHAT, json=chat(), headers=headers):
            pass
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (499, "client_disconnected", "estimated")
    assert (row["completion_tokens"], row["ttft_ms"]) == (0, None)
    assert row["prompt_tokens"] > 0
    assert await charged(gateway, session) - before == row["prompt_tokens"]


async def test_client_that_leaves_with_its_body_half_sent_is_charged_nothing(gateway, engine, session):
    rows, before = gateway.count(), await charged(gateway, session)
    async with RawClient(gateway.url) as client:
        await client.send(head("POST", CHAT, {**ALICE, "Content-Length": "1000"}) + b'{"model"')
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.3)
    assert gateway.count() == rows
    assert await charged(gateway, session) == before


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


async def is_cut(gateway, session, headers) -> bool:
    """Ask for a stream that the engine resets. False: so early that Envoy had sent nothing, and could still say 502."""
    async with session.post(gateway.url + CHAT, json=LONG, headers=headers) as answer:
        if answer.status == 502:
            assert (await answer.json())["error"]["code"] == "engine_broken"
            return False
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        return True


@pytest.mark.parametrize("chunks", [0, 1, 17])
async def test_engine_that_resets_its_stream_is_not_taken_for_a_client_that_left(gateway, engine, session, chunks):
    before = await charged(gateway, session)
    headers = asking(f"reset_after_chunks={chunks}")
    cut = await is_cut(gateway, session, headers)
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (502, "engine_lost", "estimated")
    assert row["completion_tokens"] == chunks if cut else row["completion_tokens"] <= chunks
    assert await charged(gateway, session) - before == row["prompt_tokens"] + row["completion_tokens"]


async def test_engine_that_breaks_off_streams_but_lives_stays_open_to_all(gateway, session):
    """Some request makes it reset: one tenant's doing is not to close the only engine to everybody."""
    for _ in range(8):
        headers = asking("reset_after_chunks=1")
        await is_cut(gateway, session, headers)
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
    async with asyncio.timeout(10):
        while True:
            metrics = await gateway.metrics(session)
            names = ("arks_open_leases", "arks_open_streams", "arks_engine_in_flight")
            if not any(sum_series(metrics, name) for name in names):
                break
            await asyncio.sleep(0.05)
    rows = gateway.usage()
    assert len({(row["id"], row["attempt"]) for row in rows}) == len(rows)
    assert sum_series(metrics, "arks_leases_expired_total") == 0
