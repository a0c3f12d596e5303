"""Limits to the token: whatever comes at once, not one request more than the limit allows, and nothing for refusals."""

import asyncio
import json
import re
import time
from collections import Counter

import msgspec
import pytest

from extproc.usage.bounds import prompt_upper_bound
from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import (
    endpoint,
    policy,
    quota,
    running_engine,
    running_gateway,
    sum_series,
    token,
    until,
)

TRIES = 3
BODY = chat(max_tokens=10)
RESERVED = 10 + prompt_upper_bound("chat", msgspec.json.decode(json.dumps(BODY), type=dict[str, msgspec.Raw]), 0)
"""tokens that one BODY may use at most"""
ONE_OF_MANY = RESERVED - 1


@pytest.fixture(scope="module")
def engine():
    with running_engine("--allow-fault-headers", "--max-running", "1000") as one:
        yield one


@pytest.fixture(scope="module")
def gateway(engine, tmp_path_factory):
    text = policy(
        endpoint(),
        quota("shared", total=20 * RESERVED + ONE_OF_MANY),
        quota("answers", response=25),
        quota("single", total=RESERVED),
        *(token(f"rpm-{n}", f"sk-rpm-{n}", rates={"rpm": 40}) for n in range(TRIES)),
        *(token(f"rpd-{n}", f"sk-rpd-{n}", rates={"rpd": 40, "rpm": 10_000}) for n in range(TRIES)),
        *(token(f"tpm-{n}", f"sk-tpm-{n}", rates={"tpm": 17 * RESERVED + ONE_OF_MANY}) for n in range(TRIES)),
        *(token(f"tpd-{n}", f"sk-tpd-{n}", rates={"tpd": 17 * RESERVED + ONE_OF_MANY}) for n in range(TRIES)),
        token("left", "sk-left", quota="shared"),
        token("right", "sk-right", quota="shared"),
        token("answers", "sk-answers", quota="answers"),
        token("single", "sk-single", quota="single"),
        token("three", "sk-three", maxConcurrentRequests=3, rates={"rpd": 1000}),
        token("mixed", "sk-mixed", rates={"rpm": 1000, "rpd": 50, "tpm": 10**6, "tpd": 10**5}),
        token("failing", "sk-failing", rates={"rpd": 1000, "tpd": 10**6}),
    )
    with running_gateway(tmp_path_factory.mktemp("limits"), text, [engine]) as one:
        yield one


async def within_one_minute(rate, work):
    """What `work` returns, done within one of the clock's minutes, which are the windows: a burst over their border may
    use two of them. Then the same is done with another token, whose windows are untouched.
    """
    for number in range(TRIES):
        began_minute = time.time() // 60
        done = await work(f"sk-{rate}-{number}")
        if time.time() // 60 == began_minute:
            return done
    raise AssertionError("a minute was never enough")


async def ask(gateway, session, secret, fault="", body=BODY):
    """(status, code, headers, usage's total) of one request."""
    headers = {**bearer(secret), **({"x-sim-fault": fault} if fault else {})}
    async with session.post(gateway.url + CHAT, json=body, headers=headers) as answer:
        told = json.loads(await answer.read())
    code = told["error"]["code"] if answer.status != 200 else ""
    return answer.status, code, answer.headers, told.get("usage", {}).get("total_tokens", 0)


async def burst(gateway, session, *secrets):
    return await asyncio.gather(*(ask(gateway, session, secret) for secret in secrets))


async def burst_at_once(gateway, engine, session, *secrets):
    """None that was admitted ends before all have asked."""
    await engine.faults(session, hold=True)
    asked = [asyncio.create_task(ask(gateway, session, secret)) for secret in secrets]

    def all_have(in_flight: float) -> bool:
        return in_flight + sum(task.done() for task in asked) >= len(asked)

    try:
        await gateway.until_metric(session, "arks_engine_in_flight", all_have)
    finally:
        await engine.faults(session)
    return await asyncio.gather(*asked)


def counts(answers):
    return Counter((status, code) for status, code, _, _ in answers)


@pytest.mark.parametrize("rate", ["rpm", "rpd"])
async def test_burst_of_200_at_a_limit_of_40_admits_exactly_40(gateway, session, rate):
    answers = await within_one_minute(rate, lambda secret: burst(gateway, session, *[secret] * 200))
    assert counts(answers) == {(200, ""): 40, (429, "rate_limit_exceeded"): 160}
    left = sorted(int(headers["x-ratelimit-remaining-requests"]) for status, _, headers, _ in answers if status == 200)
    assert left == list(range(40))
    for status, _, headers, _ in answers:
        assert headers["x-ratelimit-limit-requests"] == "40"
        if status == 429:
            assert headers["x-ratelimit-remaining-requests"] == "0"
            window_s = {"rpm": 60, "rpd": 86_400}[rate]
            assert 1 <= int(headers["retry-after"]) <= window_s
            assert abs(int(headers["x-ratelimit-reset-requests"].rstrip("s")) - int(headers["retry-after"])) <= 1


@pytest.mark.parametrize("rate", ["tpm", "tpd"])
async def test_parallel_requests_never_pass_a_token_limit_by_one(gateway, engine, session, rate):
    async def many_and_one_more(secret):
        return await burst_at_once(gateway, engine, session, *[secret] * 60), await ask(gateway, session, secret)

    answers, after = await within_one_minute(rate, many_and_one_more)
    assert counts(answers) == {(200, ""): 17, (429, "rate_limit_exceeded"): 43}
    used = sum(total for *_, total in answers)
    # What was reserved and not used is back, and the refused took nothing.
    _, _, headers, total = after
    assert int(headers["x-ratelimit-limit-tokens"]) == 17 * RESERVED + ONE_OF_MANY
    assert int(headers["x-ratelimit-remaining-tokens"]) == 17 * RESERVED + ONE_OF_MANY - used - RESERVED
    assert total < RESERVED


async def test_quota_that_two_tokens_share_is_one(gateway, engine, session):
    limit = 20 * RESERVED + ONE_OF_MANY
    answers = await burst_at_once(gateway, engine, session, *["sk-left", "sk-right"] * 40)
    assert counts(answers) == {(200, ""): 20, (429, "quota_exceeded"): 60}
    for status, _, headers, _ in answers:
        if status == 429:
            assert headers["x-error-quota"] == "true"
            assert int(headers["retry-after"]) > 60
            assert headers["x-ratelimit-limit-tokens"] == str(limit)
            assert int(headers["x-ratelimit-remaining-tokens"]) < RESERVED
        # A quota never refills: no reset "in 0 s", neither refused nor served.
        assert headers["x-ratelimit-reset-tokens"] == "3600s"
    used = sum(total for *_, total in answers)
    usage = [line for line in (await gateway.metrics(session)).splitlines() if 'quota_name="shared"' in line]
    spent = next(float(line.rpartition(" ")[2]) for line in usage if line.startswith("gateway_quota_usage"))
    assert spent == used


async def test_reservation_comes_back_at_the_end_of_each_request(gateway, session):
    """The quota covers one reservation: each next request only fits because the one before gave back what it left."""
    status, _, _, first = await ask(gateway, session, "sk-answers")
    assert (status, first) == (200, first)
    status, _, _, _ = await ask(gateway, session, "sk-answers")
    assert status == 200
    # 20 of 25 are spent now; 10 do not fit, 5 do.
    assert (await ask(gateway, session, "sk-answers"))[:2] == (429, "quota_exceeded")
    assert (await ask(gateway, session, "sk-answers", "", chat(max_tokens=5)))[0] == 200
    assert (await ask(gateway, session, "sk-answers", "", chat(max_tokens=1)))[:2] == (429, "quota_exceeded")


async def test_last_of_a_quota_goes_to_one_of_many(gateway, engine, session):
    answers = await burst_at_once(gateway, engine, session, *["sk-single"] * 20)
    assert counts(answers) == {(200, ""): 1, (429, "quota_exceeded"): 19}


async def test_concurrency_limit_and_its_return(gateway, engine, session):
    for _ in range(2):
        answers = await burst_at_once(gateway, engine, session, *["sk-three"] * 10)
        assert counts(answers) == {(200, ""): 3, (429, "concurrency_limit_exceeded"): 7}
    # The refused did not count as requests either.
    _, _, headers, _ = await ask(gateway, session, "sk-three")
    assert int(headers["x-ratelimit-remaining-requests"]) == 1000 - 7


async def test_headers_tell_the_tightest_limit_of_each_family(gateway, session):
    _, _, headers, _ = await ask(gateway, session, "sk-mixed")
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("50", "49")
    assert headers["x-ratelimit-limit-tokens"] == str(10**5)
    assert int(headers["x-ratelimit-remaining-tokens"]) == 10**5 - RESERVED
    assert 0 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 86_400


async def test_engines_failure_costs_nothing_its_refusal_one_request(gateway, session):
    remaining = []
    for fault in ("status=500", "status=400", "status=503", "queue_full", ""):
        answer = await ask(gateway, session, "sk-failing", fault)
        if answer[0] == 200:
            remaining.append((answer[2]["x-ratelimit-remaining-requests"], answer[2]["x-ratelimit-remaining-tokens"]))
    assert remaining == [(str(1000 - 2), str(10**6 - RESERVED))]


async def test_requests_that_never_were_consume_nothing(gateway, session):
    _, _, headers, _ = await ask(gateway, session, "sk-failing")
    before = int(headers["x-ratelimit-remaining-requests"])
    for body in (chat(max_tokens=-1), chat(model="nope"), {"messages": []}):
        assert (await ask(gateway, session, "sk-failing", "", body))[0] in (400, 404)
    async with session.post(gateway.url + CHAT, data=b"{", headers=bearer("sk-failing")) as answer:
        assert answer.status == 400
    _, _, headers, _ = await ask(gateway, session, "sk-failing")
    assert int(headers["x-ratelimit-remaining-requests"]) == before - 1


async def test_books_are_even_at_the_end(gateway, session):
    metrics = await gateway.metrics(session)
    assert sum_series(metrics, "arks_open_leases") == 0
    tokens = sum_series(metrics, "gateway_token_usage_total") + sum_series(metrics, "gateway_token_usage")
    assert tokens > 0
    # The journal writes the last rows within 100 ms.
    await until(lambda: tokens == sum(row["completion_tokens"] + row["prompt_tokens"] for row in gateway.usage()))
    kinds = set(re.findall(r"^gateway_rate_limit_hits_total\{.*rule_type=\"(\w+)\"", metrics, re.MULTILINE))
    assert kinds == {"rpm", "rpd", "tpm", "tpd", "total", "response", "concurrency"}
