"""`kill -9` under load: what was counted stays counted, to the token, but for what the journal had not saved yet.

That it saves within a tenth of a second is shown where the machine's speed plays no part: `tests/ledger`.
"""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
import uuid
from dataclasses import dataclass, field

import aiohttp
import pytest

from extproc.access_log import CLIENT_DISCONNECTED, ENGINE_LOST
from extproc.ledger.model import BROKEN_OFF
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

LIMIT = 10**9
REQUESTS = 10**6
CLIENTS = 6
BROKE_OFF = {BROKEN_OFF, CLIENT_DISCONNECTED, ENGINE_LOST}
CUT = 0
"""in the place of a status: the answer's beginning had gone out already"""
POLICY = policy(
    endpoint(),
    quota("budget", total=LIMIT),
    token("alice", "sk-alice", rates={"rpd": REQUESTS}, quota="budget"),
)
ALICE = bearer("sk-alice")


@pytest.fixture(scope="module")
def engine():
    with running_engine("--ttft-ms", "5") as one:
        yield one


@dataclass
class Load:
    """Requests one after another from several clients, and when each answer had come."""

    gateway_url: str
    ended_s: dict[str, float] = field(default_factory=dict)
    begun_s: dict[str, float] = field(default_factory=dict)
    by_client: list[list[str]] = field(default_factory=list)
    """what each client had answered, in its order"""
    failures: list[int] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, session) -> None:
        await asyncio.gather(*(self._client(session) for _ in range(CLIENTS)))

    async def _client(self, session) -> None:
        answered: list[str] = []
        self.by_client.append(answered)
        while not self.stopped.is_set():
            request_id = str(uuid.uuid4())
            headers = {**ALICE, "x-request-id": request_id}
            begun_s = time.monotonic()
            try:
                async with session.post(self.gateway_url + CHAT, json=chat(max_tokens=3), headers=headers) as answer:
                    body = await answer.read()
            except aiohttp.ClientPayloadError:
                self.failures.append(CUT)
                continue
            except aiohttp.ClientError:
                self.failures.append(-1)
                await asyncio.sleep(0.02)
                continue
            if answer.status == 200:
                answered.append(request_id)
                self.begun_s[request_id], self.ended_s[request_id] = begun_s, time.monotonic()
            else:
                assert json.loads(body)["error"]["code"] == "gateway_unavailable"
                self.failures.append(answer.status)
                await asyncio.sleep(0.02)

    async def saved(self, gateway) -> set[str]:
        """What was answered until now, once the ledger has it. The load goes on meanwhile."""
        answered = set(self.ended_s)
        await until(lambda: answered <= {row["request_id"] for row in gateway.usage()})
        return answered


def spent(rows) -> int:
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


async def check_books(gateway, session, load: Load, saved: set[str], killed_s: float) -> None:
    """The ledger has all that was saved, and of each client no answer without those before it; the counters agree."""
    rows = gateway.usage()
    known = {row["request_id"] for row in rows}
    assert saved <= known
    lost = [request for request in load.ended_s if request not in known]
    for answered in load.by_client:
        there = [request in known for request in answered if load.ended_s[request] < killed_s]
        assert there == sorted(there, reverse=True), "one was lost before another that is there"
    assert len({(row["id"], row["attempt"]) for row in rows}) == len(rows)
    metrics = await gateway.metrics(session)
    open_leases = int(sum_series(metrics, "arks_open_leases"))
    # Leases that nobody settles any more: requests under way at the kill, and those whose settling was lost.
    assert open_leases <= CLIENTS + len(lost)
    held = sum_series(metrics, "gateway_quota_usage") - spent(rows)
    assert held >= 0
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=ALICE) as answer:
        assert answer.status == 200
        await answer.read()
    # What broke off counts as a request too: extproc may have seen the others die before it did.
    charged = [row for row in rows if row["status"] == 200 or row["error"] in BROKE_OFF]
    counted = REQUESTS - 1 - int(answer.headers["x-ratelimit-remaining-requests"])
    # The journal reads rows before sums: of what was settled in between, the charge alone may have been saved.
    rowless = counted - open_leases - len(charged)
    assert 0 <= rowless <= CLIENTS + len(lost)
    assert (held > 0) == (open_leases + rowless > 0)


async def test_extproc_killed_under_load_comes_back_with_its_books(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        gateway.tolerated |= {"streams_failed", "http_not_ok_resp_received", "message_timeouts"}
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 200)
        saved = await load.saved(gateway)
        os.kill(gateway.extproc_pid, signal.SIGKILL)
        killed_s = time.monotonic()

        def after() -> set[str]:
            return {request for request, begun_s in load.begun_s.items() if begun_s > killed_s}

        await until(lambda: len(after()) > 50)
        load.stopped.set()
        await task
        assert set(load.failures) <= {503, CUT}
        assert load.failures.count(CUT) <= CLIENTS
        assert "a part died, starting it again" in gateway.log()
        await until(lambda: after() <= {row["request_id"] for row in gateway.usage()})
        await check_books(gateway, session, load, saved, killed_s)


async def test_envoy_killed_under_load_leaves_no_request_open(engine, session, tmp_path):
    """All its exchanges end at once, each is settled, and the new Envoy serves on the same port."""
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 100)
        os.kill(gateway.envoy_pid, signal.SIGKILL)
        killed_s = time.monotonic()
        await until(lambda: sum(begun_s > killed_s for begun_s in load.begun_s.values()) > 50)
        load.stopped.set()
        await task
        metrics = await gateway.until_metric(session, "arks_open_leases", lambda leases: leases == 0)
        charged = sum_series(metrics, "gateway_quota_usage")
        await until(lambda: spent(gateway.usage()) == charged)
        assert load.ended_s.keys() <= {row["request_id"] for row in gateway.usage()}


async def test_all_killed_and_started_again_on_the_same_state(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 200)
        saved = await load.saved(gateway)
        for pid in (gateway.process.pid, gateway.extproc_pid, gateway.envoy_pid):
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        load.stopped.set()
        await task
        await until(lambda: gateway.process.poll() is not None)
    with running_gateway(tmp_path, None, [engine]) as gateway:
        await check_books(gateway, session, load, saved, killed_s)


async def test_supervisor_killed_alone_takes_its_parts_along(engine, session, tmp_path):
    """Or the next start would find the port, the socket and the state taken."""
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=ALICE) as old:
            assert old.status == 200
        async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=ALICE) as answer:
            assert answer.status == 200
        assert sum_series(await gateway.metrics(session), "arks_state_free_bytes") > 0
        parts = (gateway.extproc_pid, gateway.envoy_pid)
        os.kill(gateway.process.pid, signal.SIGKILL)
        await until(lambda: not any(_alive(pid) for pid in parts))
    with contextlib.closing(sqlite3.connect(gateway.state / "arks.db")) as db, db:
        aged = (86_400_000, old.headers["x-request-id"])
        db.execute("UPDATE usage SET time_ms = time_ms - ? WHERE request_id = ?", aged)
    with running_gateway(tmp_path, None, [engine], "--retain-days", "1") as gateway:
        await until(lambda: gateway.count(old.headers["x-request-id"]) == 0)
        assert gateway.count(answer.headers["x-request-id"]) == 1


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - one line of /proc
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_open_lease_survives_the_crash(session, tmp_path):
    """What it reserved stays reserved until it expires."""
    with running_engine("--allow-fault-headers") as slow, running_gateway(tmp_path, POLICY, [slow]) as gateway:
        gateway.tolerated |= {"streams_failed", "http_not_ok_resp_received"}
        held = asyncio.create_task(_status(gateway, session))
        with contextlib.closing(sqlite3.connect(f"file:{gateway.state / 'arks.db'}?mode=ro", uri=True)) as db:
            await until(lambda: db.execute("SELECT count(*) FROM leases").fetchone() == (1,))
        old = gateway.extproc_pid
        os.kill(old, signal.SIGKILL)
        assert await held in (500, 502, 503)
        await until(lambda: not _alive(old))
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await gateway.ready(session))["status"] == 200:  # before, it knows no quota to tell of
                        break
                await asyncio.sleep(0.05)
        metrics = await gateway.metrics(session)
        assert sum_series(metrics, "arks_open_leases") == 1
        assert sum_series(metrics, "gateway_quota_usage") > 3


async def _status(gateway, session) -> int:
    """Of a request that the engine holds for ever."""
    headers = {**ALICE, "x-sim-fault": "hold"}
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=headers) as answer:
        json.loads(await answer.read())
        return int(answer.status)
