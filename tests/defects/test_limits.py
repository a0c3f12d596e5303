"""Defects of Arks in limits, quotas and their books, through a real Envoy: each test is named after its number."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import Counter

import msgspec
import pytest

from apis.policy import Endpoint, Grant, Policy, RateLimit, Token
from extproc.admission import Admission, Admitted
from extproc.errors import Refused
from extproc.limits.memory import MemoryStore
from extproc.picking import Picker
from extproc.snapshot.index import LiveIndex
from extproc.usage.bounds import prompt_upper_bound
from tests.defects.waiting import eventually
from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import endpoint, policy, quota, running_engine, running_gateway, sum_series, token
from tests.limits.ground import NOON, Clock

SLOW = "first_byte_delay_ms=700"
"""longer than a burst takes to arrive: nothing settles before all have asked"""
BODY = chat(max_tokens=10)
RESERVED = 10 + prompt_upper_bound("chat", msgspec.json.decode(json.dumps(BODY), type=dict[str, msgspec.Raw]), 0)
"""tokens that one BODY may use at most"""
MINUTE_S = 60


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    text = policy(
        endpoint(),
        quota("pot", total=6 * RESERVED),
        quota("left", total=10**6),
        token("requests", "sk-requests", rates={"rpd": 7}),
        token("tokens", "sk-tokens", rates={"tpd": 5 * RESERVED}),
        token("pot", "sk-pot", quota="pot"),
        token("leaver", "sk-leaver", rates={"rpd": 100, "tpd": 10**6}, quota="left"),
        token("unlucky", "sk-unlucky", rates={"rpd": 100, "tpd": 10**6}),
        token("minute", "sk-minute", rates={"rpm": 1}),
    )
    with (
        running_engine("--allow-fault-headers", "--itl-ms", "5", "--max-running", "1000") as engine,
        running_gateway(tmp_path_factory.mktemp("limits"), text, [engine]) as one,
    ):
        yield one


async def ask(gateway, session, secret, fault=""):
    headers = {**bearer(secret), **({"x-sim-fault": fault} if fault else {})}
    async with session.post(gateway.url + CHAT, json=BODY, headers=headers) as answer:
        await answer.read()
        return answer


async def left(gateway, session, secret) -> tuple[int, int]:
    """(requests, tokens) that remain, by the headers of one more request, without what that one takes."""
    answer = await eventually(lambda: ask(gateway, session, secret), lambda answer: answer.status == 200)
    headers = answer.headers
    return int(headers["x-ratelimit-remaining-requests"]) + 1, int(headers["x-ratelimit-remaining-tokens"]) + RESERVED


@pytest.mark.parametrize(("secret", "fits"), [("sk-requests", 7), ("sk-tokens", 5), ("sk-pot", 6)])
async def test_defect_14_parallel_requests_at_a_limit_are_admitted_to_the_last_and_no_further(
    gateway, session, secret, fits
):
    """Arks looked first and counted later, and knew tokens only when they were spent: all 80 would have passed."""
    answers = await asyncio.gather(*(ask(gateway, session, secret, SLOW) for _ in range(80)))
    assert Counter(answer.status for answer in answers) == {200: fits, 429: 80 - fits}


async def test_defect_14_a_stream_whose_client_left_is_paid_for(gateway, session):
    before = await left(gateway, session, "sk-leaver")
    spent = await spent_of(gateway, session, "left")
    headers = {**bearer("sk-leaver"), "x-request-id": str(uuid.uuid4())}
    sent = chat(stream=True, max_tokens=5000)
    async with session.post(gateway.url + CHAT, json=sent, headers=headers) as answer:
        for _ in range(20):
            await answer.content.readline()
        answer.close()
    row = await gateway.row_of(headers["x-request-id"])
    tokens = row["prompt_tokens"] + row["completion_tokens"]
    assert row["completion_tokens"] >= 5
    assert await spent_of(gateway, session, "left") - spent == tokens
    after = await left(gateway, session, "sk-leaver")
    # The first look was a request of its own.
    assert before[0] - after[0] == 2
    assert before[1] - after[1] >= tokens


async def test_defect_14_a_request_that_the_engine_failed_costs_nothing(gateway, session):
    before = await left(gateway, session, "sk-unlucky")
    for fault in ("status=500", "status=503", "queue_full", "close"):
        assert (await ask(gateway, session, "sk-unlucky", fault)).status >= 500
    after = await left(gateway, session, "sk-unlucky")
    assert before[0] - after[0] == 1


async def spent_of(gateway, session, name: str) -> float:
    """What a quota says is spent, once no request is under way."""

    async def books() -> str | None:
        metrics = await gateway.metrics(session)
        return None if sum_series(metrics, "arks_open_leases") else metrics

    metrics = await eventually(books)
    mine = [line for line in metrics.splitlines() if f'quota_name="{name}"' in line]
    return sum_series("\n".join(mine), "gateway_quota_usage")


async def test_defect_24_a_429_names_the_real_end_of_its_window(gateway, session):
    """Arks named the end of its key's life: up to two windows later, or now where there was no key."""
    began_s = time.time()
    answers = [await ask(gateway, session, "sk-minute") for _ in range(3)]
    refused = next(answer for answer in answers if answer.status == 429)
    # Asked at some moment between these two; the clock may have gone into the next minute on the way.
    ends_s = [moment_s - moment_s % MINUTE_S + MINUTE_S - moment_s for moment_s in (began_s, time.time())]
    longest, shortest = (ends_s[0], ends_s[1]) if ends_s[1] < ends_s[0] else (float(MINUTE_S), 0.0)
    told_s = int(refused.headers["retry-after"])
    assert math.floor(shortest) <= told_s <= math.ceil(longest)
    assert refused.headers["x-ratelimit-reset-requests"] == f"{told_s}s"


@pytest.mark.parametrize("kind", ["rpm", "rpd", "tpm", "tpd"])
@pytest.mark.parametrize("into_s", [0.0, 0.4, 17.0, 59.2, 59.999])
def test_defect_24_a_request_passes_at_the_moment_that_the_429_names_and_not_before(kind, into_s):
    """The whole decision, with a clock that is turned."""
    body = json.dumps(BODY).encode()
    limit = 1 if kind in ("rpm", "rpd") else RESERVED
    served = Endpoint("default", "qwen-7b", "qwen-7b", None)
    secret = Token("default", "alice", bytes(32), (Grant("qwen-7b", (RateLimit(kind, limit),)),))
    live, picker, clock = LiveIndex(), Picker(), Clock(NOON + into_s)
    index = live.replace(Policy({("default", "alice"): secret}, {}, {("default", "qwen-7b"): served}))
    picker.set_policy([served], ["127.0.0.1:1"])
    decide = Admission(live, MemoryStore(clock=clock), picker).admit
    principal = index.principals[bytes(32)]

    assert isinstance(decide(principal, "chat", body, bytes), Admitted)
    refused = decide(principal, "chat", body, bytes)
    assert isinstance(refused, Refused)
    assert refused.reason.code == "rate_limit_exceeded"
    told = dict(refused.headers)
    wait_s = int(told["retry-after"])
    assert told["x-ratelimit-reset-requests" if limit == 1 else "x-ratelimit-reset-tokens"] == f"{wait_s}s"
    clock.now_s += wait_s - 1
    if wait_s > 1:
        assert isinstance(decide(principal, "chat", body, bytes), Refused)
    clock.now_s += 1
    assert isinstance(decide(principal, "chat", body, bytes), Admitted)
