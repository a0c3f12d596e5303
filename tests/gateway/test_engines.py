"""Engines that die, come back, or are to get a share: no request is lost that could have been served elsewhere."""

import asyncio
import json
import re
import signal
import time
import uuid
from collections import Counter

import pytest

from apis.eds import ENGINES_CLUSTER
from extproc.picking import HealthSettings
from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import backend, endpoint, policy, route, running_engine, running_gateway, token, until

ALICE = bearer("sk-alice")
MODELS = ("qwen-7b", "weighted", "one-sided", "nobody")
FLAGS = ("--allow-fault-headers", *(part for model in MODELS[1:] for part in ("--model", model)))

EJECTION_S = HealthSettings().ejection_s
FIT = re.compile(r'^arks_engine_healthy\{engine="(.+)"\} 1\.0$', re.MULTILINE)


@pytest.fixture(scope="module")
def addresses():
    """Two engines' addresses, which stay theirs over restarts."""
    with running_engine() as one, running_engine() as other:
        return one.address, other.address


@pytest.fixture
def engines(addresses):
    with running_engine(*FLAGS, listen=addresses[0]) as one, running_engine(*FLAGS, listen=addresses[1]) as other:
        yield one, other


@pytest.fixture(scope="module")
def gateway(addresses, tmp_path_factory):
    one, other = addresses
    text = policy(
        endpoint(),
        endpoint("weighted", routeConfigs=[route("one", 90), route("other", 10)]),
        endpoint("one-sided", routeConfigs=[route("one", 0), route("other", 1)]),
        endpoint("nobody", routeConfigs=[route("one", 0)]),
        backend("one", one),
        backend("other", other),
        token("alice", "sk-alice", endpoints=MODELS, rates={"rpm": 10**6}),
    )
    with running_gateway(tmp_path_factory.mktemp("engines"), text, [f"http://{one}", f"http://{other}"]) as running:
        yield running


@pytest.fixture(autouse=True)
async def both_fit(gateway, engines, session):
    await until_fit(gateway, session, *(engine.address for engine in engines))
    # A request over a connection to their predecessors would be asked twice.
    active = f"cluster.{ENGINES_CLUSTER}.upstream_cx_active"
    await until(lambda: gateway.stats(f"^{active}$")[active] == 0)


async def fit(gateway, session) -> set[str]:
    """The engines that may be picked."""
    return set(FIT.findall(await gateway.metrics(session)))


async def until_fit(gateway, session, *wanted: str) -> None:
    """Until exactly these engines may be picked."""
    async with asyncio.timeout(60):
        while await fit(gateway, session) != set(wanted):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.03)


async def attempts(gateway, request_id: str) -> list[dict[str, object]]:
    """A request's rows, once the last of them has come: the one that brought the answer."""
    await until(lambda: any(row["status"] == 200 for row in rows_now(gateway, request_id)))
    return rows_now(gateway, request_id)


def rows_now(gateway, request_id: str) -> list[dict[str, object]]:
    return sorted((row for row in gateway.usage() if row["request_id"] == request_id), key=lambda row: row["attempt"])


async def served_by(gateway, request_ids) -> Counter[str]:
    """By which engines, once all of them are booked."""
    wanted = set(request_ids)
    await until(lambda: wanted <= {row["request_id"] for row in gateway.usage()})
    return Counter(row["engine"] for row in gateway.usage() if row["request_id"] in wanted)


async def ask_all(gateway, session, count: int, **fields) -> list[str]:
    """Ask one after the other, each with success; their ids."""
    ids = []
    for _ in range(count):
        status, _, request_id = await ask(gateway, session, **fields)
        assert status == 200
        ids.append(request_id)
    return ids


async def ask(gateway, session, fault="", **fields):
    """(status, error code or "", request id) of one request."""
    headers = {**ALICE, "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=2, **fields), headers=headers) as answer:
        body = json.loads(await answer.read())
    return answer.status, body.get("error", {}).get("code", "") if answer.status != 200 else "", headers["x-request-id"]


async def test_shares_follow_the_weights_exactly(gateway, engines, session):
    served = await served_by(gateway, await ask_all(gateway, session, 100, model="weighted"))
    assert served == {engines[0].address: 90, engines[1].address: 10}


async def test_weight_0_gets_nothing_not_even_a_retry(gateway, engines, session):
    ids = await ask_all(gateway, session, 10, model="one-sided")
    status, code, request_id = await ask(gateway, session, "close", model="one-sided")
    assert (status, code) == (503, "engine_unreachable")
    assert set(await served_by(gateway, [*ids, request_id])) == {engines[1].address}
    assert (await ask(gateway, session, model="nobody"))[:2] == (503, "no_healthy_engine")


async def test_requests_spread_over_equal_engines(gateway, engines, session):
    served = await served_by(gateway, await ask_all(gateway, session, 10))
    assert set(served.values()) == {5}


async def test_engine_killed_before_it_answers_costs_nobody_an_answer(gateway, engines, session):
    """Every request that the dead engine held is asked again of the other; both attempts are in the ledger."""
    victim, other = engines
    for engine in engines:
        await engine.faults(session, hold=True)
    asked = [asyncio.create_task(ask(gateway, session)) for _ in range(10)]
    await gateway.until_metric(session, "arks_engine_in_flight", lambda in_flight: in_flight == 10)
    victim.kill()
    await other.faults(session)  # who asks it from now on is served
    answers = await asyncio.gather(*asked)
    assert {status for status, _, _ in answers} == {200}
    twice = 0
    for _, _, request_id in answers:
        rows = await attempts(gateway, request_id)
        assert (rows[-1]["engine"], rows[-1]["status"]) == (other.address, 200)
        assert rows[-1]["completion_tokens"] == 2
        assert len(rows) in (1, 2)
        if len(rows) == 2:
            twice += 1
            lost = rows[0]
            assert (lost["attempt"], lost["engine"], lost["error"]) == (1, victim.address, "engine_unreachable")
            assert (lost["prompt_tokens"], lost["completion_tokens"]) == (0, 0)
            assert lost["id"] == rows[1]["id"]
            assert rows[1]["attempt"] == 2
    assert twice == 5


async def test_dead_engine_is_met_at_most_once_and_never_again_before_it_answers(gateway, engines, session, addresses):
    victim = engines[0]
    victim.kill()
    ids = await ask_all(gateway, session, 40)
    rows = [row for request_id in ids for row in await attempts(gateway, request_id)]
    met = [row for row in rows if row["engine"] == victim.address]
    assert len(met) <= 1
    assert all(row["error"] == "engine_unreachable" for row in met)
    with running_engine(*FLAGS, listen=victim.address):
        await until_fit(gateway, session, *addresses)
        assert set(await served_by(gateway, await ask_all(gateway, session, 4))) == set(addresses)


async def test_engine_that_dies_while_it_streams_is_out_at_once(gateway, engines, session):
    victim, other = engines
    streams = [{**ALICE, "x-request-id": str(uuid.uuid4()), "x-sim-fault": "stall_after_chunks=3"} for _ in range(2)]
    sent = chat(stream=True, max_tokens=100)
    async with (
        session.post(gateway.url + CHAT, json=sent, headers=streams[0]) as one,
        session.post(gateway.url + CHAT, json=sent, headers=streams[1]) as two,
    ):
        await asyncio.gather(one.content.readline(), two.content.readline())
        victim.kill()
        ids = await ask_all(gateway, session, 20)
        one.close()
        two.close()
    broken = [await gateway.row_of(headers["x-request-id"]) for headers in streams]
    rows = [row for request_id in ids for row in await attempts(gateway, request_id)]
    at_victim = [row for row in [*broken, *rows] if row["engine"] == victim.address]
    assert Counter(row["error"] for row in at_victim)["engine_lost"] == 1
    assert len(at_victim) <= 2
    assert [row["engine"] for row in rows if row["status"] == 200] == [other.address] * 20


async def test_all_engines_dead_is_a_clear_answer_and_ends_when_one_is_back(gateway, engines, session):
    for engine in engines:
        engine.kill()
    codes = [(await ask(gateway, session))[:2] for _ in range(10)]
    assert set(codes) <= {(503, "engine_unreachable"), (503, "no_healthy_engine")}
    assert codes[-1] == (503, "no_healthy_engine")
    assert (await gateway.ready(session))["checks"]["engines"]["ok"] is False
    with running_engine(*FLAGS, listen=engines[1].address):
        await until_fit(gateway, session, engines[1].address)
        assert (await ask(gateway, session))[0] == 200
    assert (await gateway.ready(session))["status"] == 200


async def test_engine_that_only_fails_is_left_alone_while_another_is_fit(gateway, engines, session):
    """5xx answers pass through; five in a row eject the engine, the other serves all."""
    failing, other = engines
    await failing.faults(session, status=500)
    seen = []
    while failing.address in await fit(gateway, session):
        began_s = time.monotonic()
        seen.append((await ask(gateway, session))[0])
        assert len(seen) < 30
    assert set(seen) == {200, 500}
    assert 1 <= seen.count(500) <= 5  # fewer where it had broken off answers before
    for _ in range(15):
        status, _, request_id = await ask(gateway, session)
        if time.monotonic() > began_s + EJECTION_S:  # on a busy machine its rest may be over by now
            break
        assert status == 200
        assert set(await served_by(gateway, [request_id])) == {other.address}
    await failing.faults(session)


async def test_engine_that_refuses_its_health_check_gets_no_requests(gateway, engines, session):
    sick, other = engines
    await sick.faults(session, health_status=503)
    await until_fit(gateway, session, other.address)
    assert set(await served_by(gateway, await ask_all(gateway, session, 6))) == {other.address}
    await sick.faults(session)


async def test_frozen_engine_is_found_by_its_silence(gateway, engines, session):
    frozen, other = engines
    frozen.signal(signal.SIGSTOP)
    try:
        await until_fit(gateway, session, other.address)
        assert (await ask(gateway, session))[0] == 200
    finally:
        frozen.signal(signal.SIGCONT)


async def test_books_are_even_at_the_end(gateway):
    await until(lambda: gateway.count() > 0)
    rows = gateway.usage()
    assert len({(row["id"], row["attempt"]) for row in rows}) == len(rows)
