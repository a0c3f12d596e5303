"""`kill -9` under load: what was counted stays counted, to the token, but for the last tenth of a second."""

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

from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import (
    endpoint,
    on_this_machine,
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
MOST_LOST_S = 0.1
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
    failures: list[int] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, session) -> None:
        await asyncio.gather(*(self._client(session) for _ in range(6)))

    async def _client(self, session) -> None:
        while not self.stopped.is_set():
            headers = {**ALICE, "x-request-id": str(uuid.uuid4())}
            try:
                async with session.post(self.gateway_url + CHAT, json=chat(max_tokens=3), headers=headers) as answer:
                    body = await answer.read()
            except aiohttp.ClientError:
                self.failures.append(0)
                await asyncio.sleep(0.02)
                continue
            if answer.status == 200:
                self.ended_s[headers["x-request-id"]] = time.monotonic()
            else:
                assert json.loads(body)["error"]["code"] == "gateway_unavailable"
                self.failures.append(answer.status)
                await asyncio.sleep(0.02)


def spent(rows) -> int:
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


async def check_books(gateway, session, load: Load, killed_s: float) -> None:
    """The ledger has every answer but those of the last tenth of a second, and the counters agree with it."""
    rows = gateway.usage()
    known = {row["request_id"] for row in rows}
    lost = [request for request in load.ended_s if request not in known]
    most_lost_s = on_this_machine(MOST_LOST_S)
    assert all(killed_s - most_lost_s <= load.ended_s[request] <= killed_s + 0.05 for request in lost), [
        killed_s - load.ended_s[request] for request in lost
    ]
    assert len({(row["id"], row["attempt"]) for row in rows}) == len(rows)
    metrics = await gateway.metrics(session)
    open_leases = int(sum_series(metrics, "arks_open_leases"))
    # Leases that nobody settles any more: requests under way at the kill, and those whose settling was lost.
    assert open_leases <= 6 + len(lost)
    held = sum_series(metrics, "gateway_quota_usage") - spent(rows)
    assert held >= 0
    assert (held > 0) == (open_leases > 0)
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=ALICE) as answer:
        assert answer.status == 200
        await answer.read()
    charged = [row for row in rows if row["status"] == 200]
    assert REQUESTS - 1 - int(answer.headers["x-ratelimit-remaining-requests"]) == len(charged) + open_leases


async def test_extproc_killed_under_load_comes_back_with_its_books(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        gateway.tolerated |= {"streams_failed", "http_not_ok_resp_received", "message_timeouts"}
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 200, 30)
        os.kill(gateway.extproc_pid, signal.SIGKILL)
        killed_s = time.monotonic()
        at_kill = len(load.ended_s)
        await until(lambda: any(ended_s > killed_s + 0.1 for ended_s in load.ended_s.values()), 20)
        await until(lambda: len(load.ended_s) > at_kill + 50, 20)
        load.stopped.set()
        await task
        assert set(load.failures) <= {503}
        assert "a part died, starting it again" in gateway.log()
        await gateway.row_of(max(load.ended_s, key=lambda request: load.ended_s[request]))
        await check_books(gateway, session, load, killed_s)


async def test_envoy_killed_under_load_leaves_no_request_open(engine, session, tmp_path):
    """All its exchanges end at once, each is settled, and the new Envoy serves on the same port."""
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 100, 30)
        os.kill(gateway.envoy_pid, signal.SIGKILL)
        killed_s = time.monotonic()
        await until(lambda: sum(ended_s > killed_s + 0.1 for ended_s in load.ended_s.values()) > 50, 20)
        load.stopped.set()
        await task
        last = max(load.ended_s, key=lambda request: load.ended_s[request])
        await gateway.row_of(last)
        async with asyncio.timeout(10):
            while sum_series(await gateway.metrics(session), "arks_open_leases"):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        charged = sum_series(await gateway.metrics(session), "gateway_quota_usage")
        # Rows of what broke off wait a moment for Envoy's word, which never comes.
        await until(lambda: spent(gateway.usage()) == charged, 5)
        assert load.ended_s.keys() <= {row["request_id"] for row in gateway.usage()}


async def test_all_killed_and_started_again_on_the_same_state(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        load = Load(gateway.url)
        task = asyncio.create_task(load.run(session))
        await until(lambda: len(load.ended_s) > 200, 30)
        for pid in (gateway.process.pid, gateway.extproc_pid, gateway.envoy_pid):
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        load.stopped.set()
        await task
    with running_gateway(tmp_path, None, [engine]) as gateway:
        await check_books(gateway, session, load, killed_s)


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
        await until(lambda: not any(_alive(pid) for pid in parts), 30)
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


async def test_open_lease_survives_the_crash(engine, session, tmp_path):
    """What it reserved stays reserved until it expires."""
    with running_engine("--ttft-ms", "20000") as slow, running_gateway(tmp_path, POLICY, [slow]) as gateway:
        gateway.tolerated |= {"streams_failed", "http_not_ok_resp_received"}
        held = asyncio.create_task(_status(gateway, session))
        async with asyncio.timeout(10):
            while not sum_series(await gateway.metrics(session), "arks_open_leases"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        os.kill(gateway.extproc_pid, signal.SIGKILL)
        status = await held
        assert status in (500, 502, 503)
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await gateway.ready(session))["status"] == 200:  # before, it knows no quota to tell of
                        break
                await asyncio.sleep(0.05)
        metrics = await gateway.metrics(session)
        assert sum_series(metrics, "arks_open_leases") == 1
        assert sum_series(metrics, "gateway_quota_usage") > 3


async def _status(gateway, session) -> int:
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=3), headers=ALICE) as answer:
        json.loads(await answer.read())
        return int(answer.status)
