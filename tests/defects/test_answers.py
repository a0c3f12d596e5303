"""Defects of Arks in answers on their way back, through a real Envoy: each test is named after its number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import uuid

import pytest

from tests.defects.scripted import DONE, STREAM, USAGE, completion, delta, event, http_answer
from tests.defects.waiting import eventually
from tests.harness.client import CHAT, bearer, chat, contents, events
from tests.harness.gateway import backend, endpoint, policy, quota, route, running_engine, running_gateway, token

DEFAULT_TIMEOUT_S = 15
"""Envoy Gateway's own request timeout where nobody sets one: it covers the whole answer"""
MODELS = ("qwen-7b", "scripted", "late")


def the_policy(scripted, late, *, quotas: bool = True) -> str:
    return policy(
        endpoint(),
        endpoint("scripted", routeConfigs=[route("scripted", 1)]),
        endpoint("late", routeConfigs=[route("late", 1)]),
        backend("scripted", scripted.address),
        backend("late", late.address),
        token("alice", "sk-alice", MODELS, rates={"rpm": 10**6}),
        token("bob", "sk-bob", MODELS, quota="bobs"),
        *([quota("bobs", total=10**9)] if quotas else []),
    )


@pytest.fixture(scope="module")
def late():
    with running_engine("--ttft-ms", str((DEFAULT_TIMEOUT_S + 1) * 1000), model="late") as one:
        yield one


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "20", "--allow-fault-headers") as one:
        yield one


@pytest.fixture(scope="module")
def gateway(engine, scripted, late, tmp_path_factory):
    with running_gateway(tmp_path_factory.mktemp("answers"), the_policy(scripted, late), [engine]) as one:
        yield one


def asking(secret: str = "sk-alice", fault: str = "") -> dict[str, str]:
    return {**bearer(secret), "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}


async def ask(gateway, session, **fields):
    """(answer, its body, its row of the ledger)."""
    headers = fields.pop("headers", None) or asking()
    async with session.post(gateway.url + CHAT, json=chat(**fields), headers=headers) as answer:
        body = await answer.read()
    return answer, body, await gateway.row_of(headers["x-request-id"])


async def scripted_answer(gateway, session, scripted, written: bytes, **fields):
    scripted.answer = written
    return await ask(gateway, session, model="scripted", **fields)


async def ready(gateway, session, holds) -> None:
    """Wait until `holds` of what /readyz tells."""
    await eventually(lambda: gateway.ready(session), holds)


async def test_defect_03_an_answer_that_takes_longer_than_15_s_arrives_whole(gateway, session):
    async def one(*, stream: bool) -> tuple[int, str]:
        answer, body, row = await ask(gateway, session, model="late", max_tokens=3, stream=stream)
        assert row["duration_ms"] > DEFAULT_TIMEOUT_S * 1000
        return answer.status, events(body)[-1] if stream else json.loads(body)["choices"][0]["finish_reason"]

    assert await asyncio.gather(one(stream=False), one(stream=True)) == [(200, "length"), (200, "[DONE]")]


@pytest.mark.parametrize("fault", ["cut_every_bytes=1", "comments", "comments,crlf,cut_every_bytes=13"])
async def test_defect_05_a_stream_that_comes_in_any_pieces_arrives_and_is_charged(gateway, session, fault):
    """Arks read each piece as if it held whole events, and reset the stream where it did not."""
    answer, body, row = await ask(gateway, session, stream=True, max_tokens=20, headers=asking(fault=fault))
    assert answer.status == 200
    assert events(body)[-1] == "[DONE]"
    assert len(contents(body)) >= 20
    assert (row["status"], row["completion_tokens"], row["accuracy"], row["error"]) == (200, 20, "exact", "")


async def test_defect_05_an_event_longer_than_64_kib_arrives_and_is_charged(gateway, session, scripted):
    long = "word " * 40_000
    written = http_answer(200, delta(long) + DONE, STREAM)
    _, body, row = await scripted_answer(gateway, session, scripted, written, stream=True)
    assert [each["choices"][0]["delta"]["content"] for each in contents(body)] == [long]
    assert events(body)[-1] == "[DONE]"
    assert (row["prompt_tokens"], row["completion_tokens"], row["accuracy"]) == (11, 5, "exact")


async def test_defect_05_an_error_event_reaches_the_client_and_fails_the_row(gateway, session, scripted):
    written = http_answer(200, delta("Well") + event(error={"message": "out of memory", "code": 500}) + DONE, STREAM)
    answer, body, row = await scripted_answer(gateway, session, scripted, written, stream=True)
    assert answer.status == 200
    assert [each["error"]["message"] for each in contents(body) if "error" in each] == ["out of memory"]
    assert events(body)[-1] == "[DONE]"
    assert row["error"] == "engine_error"
    assert row["completion_tokens"] == 5


async def test_defect_17_a_ledger_that_fails_meanwhile_breaks_no_answer(gateway, session):
    """Arks' Redis failing at an answer's end was told by an error after the answer's headers: a reset."""
    headers = asking()
    async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=50), headers=headers) as answer:
        await answer.content.readline()
        with contextlib.closing(sqlite3.connect(gateway.state / "arks.db", isolation_level=None)) as thief:
            thief.execute("BEGIN IMMEDIATE")
            body = await answer.read()
            await ready(gateway, session, lambda told: not told["checks"]["journal"]["writing"])
            thief.execute("ROLLBACK")
    assert events(body)[-1] == "[DONE]"
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["completion_tokens"], row["accuracy"]) == (200, 50, "exact")
    await ready(gateway, session, lambda told: told["checks"]["journal"]["writing"])


async def test_defect_17_a_quota_deleted_meanwhile_breaks_no_answer(gateway, session, scripted, late):
    generation = (await gateway.ready(session))["checks"]["policy"]["generation"]
    headers = asking("sk-bob")
    async with session.post(gateway.url + CHAT, json=chat(stream=True, max_tokens=100), headers=headers) as answer:
        await answer.content.readline()
        gateway.write_policy(the_policy(scripted, late, quotas=False))
        await ready(gateway, session, lambda told: told["checks"]["policy"]["generation"] > generation)
        body = await answer.read()
    assert events(body)[-1] == "[DONE]"
    assert (await gateway.row_of(headers["x-request-id"]))["completion_tokens"] == 100
    gateway.write_policy(the_policy(scripted, late))


@pytest.mark.parametrize("stream", [False, True])
async def test_defect_17_an_answer_that_is_no_completion_arrives_as_it_is(gateway, session, scripted, stream):
    """Arks answered 500 where the body had no `model`, by then too late to be seen."""
    odd = b'{"choices": [], "note": "no model, no usage"}'
    answer, body, row = await scripted_answer(gateway, session, scripted, http_answer(200, odd), stream=stream)
    assert (answer.status, body) == (200, odd)
    assert (row["status"], row["accuracy"]) == (200, "estimated")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 422])
async def test_defect_17_an_engines_refusal_reaches_the_client_with_its_body(
    gateway, session, scripted, status, stream
):
    refusal = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": status}}
    answer, body, row = await scripted_answer(gateway, session, scripted, http_answer(status, refusal), stream=stream)
    assert (answer.status, json.loads(body)) == (status, refusal)
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == (status, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [500, 503])
async def test_defect_18_an_engines_failure_keeps_its_body(gateway, session, scripted, status, stream):
    failure = {"error": {"message": "CUDA error: out of memory", "type": "InternalServerError", "code": status}}
    answer, body, row = await scripted_answer(gateway, session, scripted, http_answer(status, failure), stream=stream)
    assert (answer.status, json.loads(body)) == (status, failure)
    assert not [name for name in answer.headers if name.lower().startswith("x-error")]
    assert (row["status"], row["error"], row["prompt_tokens"], row["completion_tokens"]) == (
        status,
        "engine_error",
        0,
        0,
    )


@pytest.mark.parametrize("status", [201, 202, 206])
async def test_defect_18_every_success_is_one(gateway, session, scripted, status):
    """Arks took any status but 200 for an error."""
    written = completion()
    answer, body, row = await scripted_answer(gateway, session, scripted, http_answer(status, written))
    assert (answer.status, json.loads(body)) == (status, written)
    assert (row["status"], row["error"], row["accuracy"]) == (status, "", "exact")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


async def test_defect_18_a_success_without_a_body_is_one_and_costs_no_tokens(gateway, session, scripted):
    answer, body, row = await scripted_answer(gateway, session, scripted, http_answer(204))
    assert (answer.status, body) == (204, b"")
    assert (row["status"], row["error"], row["prompt_tokens"], row["completion_tokens"]) == (204, "", 0, 0)


TWICE = [("set-cookie", "session=a; Path=/"), ("set-cookie", "affinity=b; Path=/"), ("x-note", "a"), ("x-note", "b")]


@pytest.mark.parametrize("stream", [False, True])
async def test_defect_29_headers_of_several_values_keep_them_all(gateway, session, scripted, stream):
    """Arks set each header of the answer anew, one by one."""
    content = delta("Well.") + DONE if stream else json.dumps(completion()).encode()
    kind = STREAM if stream else ("content-type", "application/json")
    written = http_answer(200, content, kind, *TWICE)
    answer, _, _ = await scripted_answer(gateway, session, scripted, written, stream=stream)
    assert [(name.lower(), value) for name, value in answer.headers.items() if name.lower() in dict(TWICE)] == TWICE
