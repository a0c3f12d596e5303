"""Defects of Arks in what it counts and what it keeps, through a real Envoy: each test is named after its number."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import re
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from apis.policy import Endpoint, Grant, Policy, RateLimit, Token
from apis.wire.ext_proc_pb2 import ProcessingRequest
from extproc import app
from extproc.access_log import CLIENT_DISCONNECTED
from extproc.exchange import Deps, Exchange
from extproc.ledger.model import UsageRecord
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts
from extproc.observe.metrics import GatewayMetrics
from extproc.picking import Picker
from extproc.settings import ExtprocSettings
from extproc.snapshot.index import LiveIndex
from extproc.transport.core import CloseReason
from tests.defects.scripted import DONE, delta
from tests.defects.waiting import eventually
from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import endpoint, policy, quota, running_engine, running_gateway, sum_series, token

STREAMS, PLAIN, FAILED = 3, 2, 1
TOKENS = 25
REQUEST_ID = "request-1"
PROMPT = "All that the prompt says. " * 800
"""20 KB: what is kept of thousands of requests would show"""
WARM, REQUESTS, AT_ONCE = 400, 2000, 40
MOST_GROWTH_MB = 12
"""where every second request leaves its prompt behind, it is 20"""


@pytest.fixture(scope="module")
def engine():
    with running_engine("--itl-ms", "2", "--allow-fault-headers", "--max-running", "1000") as one:
        yield one


@pytest.fixture
def gateway(engine, tmp_path):
    text = policy(
        endpoint(),
        quota("pot", total=10**9),
        token("alice", "sk-alice", rates={"rpd": 10**6, "tpd": 10**9}, quota="pot"),
        token("none", "sk-none", rates={"rpd": 0}),
    )
    with running_gateway(tmp_path, text, [engine]) as one:
        yield one


def series(metrics: str, name: str, **labels: str) -> dict[str, float]:
    """A metric's values with these labels, by all of their labels' text."""
    found = {}
    for line in metrics.splitlines():
        match = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
        if match and all(f'{key}="{value}"' in match[1] for key, value in labels.items()):
            found[match[1]] = float(match[2])
    return found


async def test_defect_15_every_request_is_counted_once_with_its_tokens_and_refusals_are_seen(gateway, session):
    """Arks counted each piece of an answer as a request, missed the tokens of most streams, and saw no refusal."""

    async def ask(secret="sk-alice", fault="", **fields) -> int:
        headers = {**bearer(secret), **({"x-sim-fault": fault} if fault else {})}
        async with session.post(gateway.url + CHAT, json=chat(max_tokens=TOKENS, **fields), headers=headers) as answer:
            await answer.read()
            return answer.status

    statuses = [await ask(stream=True) for _ in range(STREAMS)]
    # One of the streams in pieces of seven bytes: some hundred messages between Envoy and extproc.
    statuses.append(await ask(stream=True, fault="cut_every_bytes=7"))
    statuses += [await ask() for _ in range(PLAIN)]
    assert statuses == [200] * (STREAMS + 1 + PLAIN)
    assert await ask(fault="status=500") == 500
    assert [await ask("sk-nobody"), await ask("sk-none")] == [401, 429]

    served = STREAMS + 1 + PLAIN
    metrics = await eventually(
        lambda: gateway.metrics(session), lambda text: sum_series(text, "gateway_requests_total") >= served + FAILED
    )
    about = {"namespace": "default", "model": "qwen-7b"}
    requests = series(metrics, "gateway_requests_total", **about)
    assert {next(iter(re.findall(r'status="(\d+)"', key))): value for key, value in requests.items()} == {
        "200": served,
        "500": FAILED,
    }
    assert sum_series(metrics, "gateway_requests_total") == served + FAILED
    assert sum_series(metrics, "gateway_request_duration_seconds_count") == served + FAILED
    rows = await gateway.rows(served + FAILED)
    for kind, column in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        told = series(metrics, "gateway_token_usage_total", type=kind, **about) or series(
            metrics, "gateway_token_usage", type=kind, **about
        )
        assert sum(told.values()) == sum(row[column] for row in rows) > 0
    assert sum(row["completion_tokens"] for row in rows) == served * TOKENS
    # Arks' label `token` held the model.
    assert not re.search(r'^gateway_[^\n]*[{,]token="', metrics, re.MULTILINE)
    for reason in ("invalid_token", "rate_limit_exceeded"):
        assert list(series(metrics, "arks_refused_requests_total", reason=reason).values()) == [1], reason
    # The gateway's own first request, without a token, is among the errors.
    for error in ("invalid_token", "rate_limit_exceeded", "engine_error"):
        assert list(series(metrics, "gateway_errors_total", error_type=error).values()) == [1], error
    assert sum(series(metrics, "gateway_rate_limit_hits_total", rule_type="rpd", **about).values()) == 1


async def test_defect_15_the_gauges_of_a_quota_are_set(gateway, session):
    """Arks declared them, and errors, and never set them."""
    async with session.post(gateway.url + CHAT, json=chat(), headers=bearer("sk-alice")) as answer:
        used = (await answer.json())["usage"]["total_tokens"]
    metrics = await gateway.metrics(session)
    about = {"namespace": "default", "quota_name": "pot", "quota_type": "total"}
    assert list(series(metrics, "gateway_quota_usage", **about).values()) == [used]
    assert list(series(metrics, "gateway_quota_limit", **about).values()) == [10**9]


def test_defect_15_what_is_left_of_a_tokens_limits_is_told_where_tokens_are_labels(tmp_path):
    """`gateway_rate_limit_tokens`, which Arks declared, too. A series per token is not for every Prometheus."""
    rates = (RateLimit("rpd", 50), RateLimit("tpd", 10_000))
    served = Endpoint("team-a", "qwen-7b", "qwen-7b", None)
    alice = Token("team-a", "alice", bytes(32), (Grant("qwen-7b", rates),))
    idle = Token("team-a", "idle", bytes(31) + b"1", (Grant("qwen-7b", rates),))
    tokens = {(token.namespace, token.name): token for token in (alice, idle)}
    told = {}
    for per_token in (True, False):
        process = app.Gateway(
            ExtprocSettings(
                listen="",
                admin="",
                policy_dir=tmp_path,
                state_dir=tmp_path / str(per_token),
                metrics_per_token=per_token,
            )
        )
        index = process._live.replace(Policy(tokens, {}, {("team-a", "qwen-7b"): served}))
        process._watch_metrics()
        rules = index.principals[bytes(32)].grants["qwen-7b"].rules
        process._store.settle(
            process._store.reserve("spent", rules, Amounts(1, 100, 900), ttl_s=60), Amounts(1, 100, 50)
        )
        process._store.reserve("open", rules, Amounts(1, 100, 900), ttl_s=60)
        told[per_token] = series(process._metrics.text().decode(), "gateway_rate_limit_tokens")
        process._journal.close()
    about = 'namespace="team-a",user="alice",model="qwen-7b",rule_type='
    assert told == {True: {f'{about}"rpd"': 48, f'{about}"tpd"': 10_000 - 150 - 1000}, False: {}}


def spoken(engine: str, *, leaves: bool) -> list[bytes]:
    """What Envoy tells of one streamed request; without its end where the client left."""
    asked, body, answered = ProcessingRequest(), ProcessingRequest(), ProcessingRequest()
    for name, value in (
        (":method", "POST"),
        (":path", CHAT),
        ("authorization", "Bearer sk-alice"),
        ("x-request-id", REQUEST_ID),
    ):
        asked.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    body.request_body.body = json.dumps(chat(stream=True)).encode()
    body.request_body.end_of_stream = True
    for name, value in ((":status", "200"), ("content-type", "text/event-stream")):
        answered.response_headers.headers.headers.add(key=name, raw_value=value.encode())
    attributes = answered.attributes["envoy.filters.http.ext_proc"].fields
    attributes["upstream.address"].string_value = engine
    attributes["response.code_details"].string_value = "via_upstream"
    pieces = [delta("Well"), delta(", well"), *([] if leaves else [DONE])]
    chunks = []
    for piece in pieces:
        chunk = ProcessingRequest()
        chunk.response_body.body = piece
        chunk.response_body.end_of_stream = piece == DONE
        chunks.append(chunk)
    return [each.SerializeToString() for each in (asked, body, answered, *chunks)]


class NoLedger:
    def append(self, record: UsageRecord) -> None: ...


async def test_defect_16_a_request_that_ended_holds_no_object(engine):
    """The same without sockets, where every object can be counted."""
    served = Endpoint("default", "qwen-7b", "qwen-7b", None)
    rates = (RateLimit("rpd", 10**9), RateLimit("tpd", 10**12))
    alice = Token("default", "alice", hashlib.sha256(b"sk-alice").digest(), (Grant("qwen-7b", rates),))
    live, picker, metrics = LiveIndex(), Picker(), GatewayMetrics()
    live.replace(Policy({("default", "alice"): alice}, {}, {("default", "qwen-7b"): served}))
    picker.set_policy([served], [engine.address])
    deps = Deps(live, MemoryStore(), NoLedger(), picker, metrics)
    talks = [spoken(engine.address, leaves=False), spoken(engine.address, leaves=True)]

    def run(count: int) -> None:
        for number in range(count):
            exchange = Exchange(deps)
            for message in talks[number % 2]:
                assert exchange.on_message(message)
            exchange.on_close(CloseReason.RESET)
            # What Envoy's access log says of those that broke off.
            deps.abandoned.tell(REQUEST_ID, CLIENT_DISCONNECTED)
        metrics.count_ended()
        assert deps.open == 0

    async def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    probes = asyncio.create_task(picker.run())
    try:
        run(WARM)
        before = await blocks()
        run(REQUESTS)
        # The probes that were asked for end soon.
        await eventually(blocks, lambda now: now - before < REQUESTS / 10)
    finally:
        probes.cancel()
        await asyncio.gather(probes, return_exceptions=True)


async def test_defect_16_thousands_of_streams_ended_and_left_leave_nothing_behind(gateway, session):
    """Arks kept an entry of every stream, and the beginning of every answer whose client left."""
    room = asyncio.Semaphore(AT_ONCE)
    body = json.dumps(chat(stream=True, messages=[{"role": "user", "content": PROMPT}], max_tokens=40)).encode()

    async def one(*, leaves: bool) -> None:
        headers = {**bearer("sk-alice"), "content-type": "application/json", "x-request-id": str(uuid.uuid4())}
        async with room, session.post(gateway.url + CHAT, data=body, headers=headers) as answer:
            assert answer.status == 200
            if leaves:
                await answer.content.readline()
                answer.close()
            else:
                await answer.read()

    async def idle() -> str | None:
        metrics = await gateway.metrics(session)
        names = ("arks_open_streams", "arks_open_leases", "arks_engine_in_flight", "arks_journal_queued")
        return None if any(sum_series(metrics, name) for name in names) else metrics

    async def run(count: int) -> str:
        await asyncio.gather(*(one(leaves=number % 2 == 0) for number in range(count)))
        told: str = await eventually(idle, timeout_s=30)
        return told

    await run(WARM)
    before_mb = rss_mb(gateway.extproc_pid)
    metrics = await run(REQUESTS)
    assert rss_mb(gateway.extproc_pid) - before_mb < MOST_GROWTH_MB
    assert sum_series(metrics, "arks_leases_expired_total") == 0
    rows = gateway.usage()
    assert len(rows) == WARM + REQUESTS
    ends = Counter(row["error"] for row in rows)
    assert ends["client_disconnected"] > REQUESTS / 4
    assert ends.keys() <= {"", "client_disconnected"}


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
