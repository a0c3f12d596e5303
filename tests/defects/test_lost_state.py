"""Arks' Redis, without a volume, lost its counters at every restart, and its plugin then zeroed every quota.

What holds the counters today is the state folder of one process; a shared store brings a test of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from extproc.journal.errors import StateUnreadable
from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.query import query
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from tests.defects.waiting import eventually
from tests.harness.client import CHAT, bearer, chat
from tests.harness.gateway import endpoint, policy, quota, running_engine, running_gateway, token, until
from tests.ledger.test_journal_failures import until as wait_until
from tests.limits.ground import ONE, Clock, admitted, record, tpd
from tests.limits.ground import quota as quota_rule

POLICY = policy(endpoint(), quota("pot", response=25), token("alice", "sk-alice", quota="pot"))
"""two answers of ten tokens, and not a third"""


@pytest.fixture(scope="module")
def engine():
    with running_engine() as one:
        yield one


async def ask(gateway, session) -> tuple[int, str]:
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=10), headers=bearer("sk-alice")) as answer:
        told = json.loads(await answer.read())
        return answer.status, told.get("error", {}).get("code", "")


SPENT = (429, "quota_exceeded")


async def spend(gateway, session) -> None:
    assert [(await ask(gateway, session))[0] for _ in range(2)] == [200, 200]
    assert await ask(gateway, session) == SPENT
    await gateway.rows(2)


def files(state: Path) -> list[Path]:
    return sorted(state.glob("arks.db*"))


def take_away(state: Path) -> None:
    for path in files(state):
        path.unlink()


def move_away(state: Path) -> None:
    for path in files(state):
        path.rename(path.with_name(f"moved-{path.name}"))


def put_another(state: Path) -> None:
    take_away(state)
    with contextlib.closing(sqlite3.connect(state / "arks.db")) as other:
        other.execute("CREATE TABLE foreign_to_us (id INTEGER)")


def lose_the_log(state: Path) -> None:
    (state / "arks.db-wal").unlink()


@pytest.mark.parametrize("spoil", [take_away, move_away, put_another, lose_the_log])
async def test_defect_06_counters_taken_away_from_a_running_gateway_are_put_back(engine, session, tmp_path, spoil):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        await spend(gateway, session)
        spoil(gateway.state)
        await until(lambda: "journal_put_back" in gateway.log())
        assert await ask(gateway, session) == SPENT
        assert len(gateway.usage()) == 2
        os.kill(gateway.extproc_pid, signal.SIGKILL)
        gateway.process.kill()
        gateway.process.wait(10)
    with running_gateway(tmp_path, None, [engine]) as gateway:
        assert await ask(gateway, session) == SPENT
        assert len(gateway.usage()) == 2


async def test_defect_06_counters_cut_short_under_a_running_gateway_are_told_and_refused(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        await spend(gateway, session)
    # All is in the file now, nothing in its log.
    with running_gateway(tmp_path, None, [engine]) as gateway:
        assert await ask(gateway, session) == SPENT
        os.truncate(gateway.state / "arks.db", 4096)
        await eventually(lambda: ask(gateway, session), lambda told: told == (503, "limits_unavailable"))
        told = await gateway.ready(session)
        assert told["status"] == 503
        assert told["checks"]["journal"]["writing"] is False
        assert "arks_journal_working 0.0" in await gateway.metrics(session)
    with pytest.raises(AssertionError, match=r"arks\.db"), running_gateway(tmp_path, None, [engine]):
        pass


def test_a_database_that_its_operator_compacts_is_whole(tmp_path: Path):
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    for number in range(20_000):
        ledger.append(record(f"r{number:05}"))
    assert journal.flush()
    before = checkpointed(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "arks.db", isolation_level=None)) as operator:
        operator.execute("DELETE FROM usage WHERE id > 'r00010'")
        operator.execute("VACUUM")
    assert checkpointed(tmp_path) < before / 2
    ledger.append(record("after"))
    assert journal.flush()
    assert journal.status.ok
    assert journal.close()
    assert len(query(tmp_path)) == 12


def checkpointed(state: Path) -> int:
    """The file's size once all of its log is in it."""
    with contextlib.closing(sqlite3.connect(state / "arks.db", isolation_level=None)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return (state / "arks.db").stat().st_size


def emptied(state: Path) -> None:
    take_away(state)
    (state / "arks.db").write_bytes(b"")


def overwritten(state: Path) -> None:
    take_away(state)
    (state / "arks.db").write_bytes(b"no database at all, but long enough to look at" * 200)


@pytest.mark.parametrize(("spoil", "word"), [(take_away, "gone"), (emptied, "empty"), (overwritten, "NOTADB")])
async def test_defect_06_lost_counters_refuse_the_start_and_say_what_to_do(engine, session, tmp_path, spoil, word):
    """Arks began at nothing, and wrote that nothing over what the cluster still knew."""
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        await spend(gateway, session)
    spoil(gateway.state)
    with pytest.raises(AssertionError) as ended, running_gateway(tmp_path, None, [engine]):
        pass
    told = str(ended.value)
    assert "arks.db" in told
    assert word in told
    assert "to start with empty counters" in told


async def test_defect_06_starting_with_empty_counters_is_a_decision(engine, session, tmp_path):
    with running_gateway(tmp_path, POLICY, [engine]) as gateway:
        await spend(gateway, session)
    take_away(gateway.state)
    (gateway.state / "arks.lock").unlink()
    with running_gateway(tmp_path, None, [engine]) as gateway:
        assert await ask(gateway, session) == (200, "")


def test_defect_06_a_state_folder_that_is_gone_comes_back_whole(tmp_path: Path):
    state = tmp_path / "state"
    rules = (tpd(10**6), quota_rule(10**6))
    journal = Journal(state)
    store, ledger = MemoryStore(clock=Clock(), journal=journal), SqliteLedger(journal)
    journal.start()
    held = admitted(store.reserve("held", rules, ONE, ttl_s=600))
    store.settle(admitted(store.reserve("spent", rules, ONE, ttl_s=600)), ONE)
    ledger.append(record("before"))
    assert journal.flush()
    for path in state.iterdir():
        path.unlink()
    state.rmdir()
    ledger.append(record("after"))
    assert journal.flush()
    assert held.holds is not None
    assert journal.close()
    assert {row.id for row in query(state)} == {"before", "after"}
    journal = Journal(state)
    store = MemoryStore(clock=Clock(), journal=journal)
    assert (store.used(rules[1].key), store.reserved(rules[1].key), store.open_leases) == (100, 100, 1)
    journal.close()


def test_defect_06_a_folder_that_cannot_be_written_again_refuses(tmp_path: Path):
    """`serve` would go on, by its setting, with the counters in memory."""
    state = tmp_path / "state"
    journal = Journal(state, JournalSettings(on_failure="refuse", grace_s=0.1))
    store = MemoryStore(clock=Clock(), journal=journal)
    journal.start()
    assert journal.flush()
    for path in state.iterdir():
        path.unlink()
    state.rmdir()
    state.write_text("a file where the folder was")
    journal.wake()
    wait_until(lambda: journal.refusing)
    with pytest.raises(Exception, match="usage cannot be saved"):
        store.reserve("a", (quota_rule(10),), ONE, ttl_s=600)
    state.unlink()
    assert journal.flush()
    assert not journal.refusing
    journal.close()


def test_defect_06_a_start_that_never_got_a_database_is_no_loss(tmp_path: Path):
    """Such as on a full disk: the lock is there, counters never were."""
    (tmp_path / "arks.db").mkdir()
    with pytest.raises(StateUnreadable, match="no permission, or not a file"):
        Journal(tmp_path)
    (tmp_path / "arks.db").rmdir()
    Journal(tmp_path).close()
