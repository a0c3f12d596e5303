"""Full disk, locked file, damaged file, second process: each has a stated outcome, and nothing queued is lost."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from extproc.journal import writer
from extproc.journal.errors import StateInUse, StateTooNew, StateUnreadable
from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.query import query
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.limits.model import StoreUnavailable
from tests.limits.ground import ONE, Clock, admitted, quota, record, tpd

RULES = (tpd(10**6), quota(10**6))


def until(true, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "in time"
        time.sleep(0.01)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: what a full disk looks like from inside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(params=["locked", "full"])
def broken(request: pytest.FixtureRequest):
    def breaking(journal: Journal):
        return locked(journal.path) if request.param == "locked" else full_disk()

    return breaking


def test_refuse_admits_nobody_after_the_grace_and_loses_nothing(broken, tmp_path: Path):
    journal = Journal(tmp_path, JournalSettings(on_failure="refuse", grace_s=0.4))
    store, ledger = MemoryStore(clock=Clock(), journal=journal), SqliteLedger(journal)
    journal.start()
    lease = admitted(store.reserve("a", RULES, ONE, ttl_s=600))
    assert journal.flush()
    with capture_logs() as logs:
        with broken(journal):
            # Within the grace requests go on.
            admitted(store.reserve("b", RULES, ONE, ttl_s=600))
            store.settle(lease, ONE)
            for n in range(50):
                ledger.append(record(f"r{n}"))
            until(lambda: journal.refusing)
            with pytest.raises(StoreUnavailable, match="SQLITE_"):
                store.reserve("c", RULES, ONE, ttl_s=600)
            status = journal.status
            assert not status.ok
            assert status.reason.startswith("SQLITE_")
            assert status.queued >= 50
            assert abs(status.since_s - time.time()) < 30
        until(lambda: journal.status.ok)
        assert not journal.refusing
    admitted(store.reserve("d", RULES, ONE, ttl_s=600))
    assert journal.close()
    assert len(query(tmp_path)) == 50
    journal = Journal(tmp_path)
    after = MemoryStore(clock=Clock(), journal=journal)
    journal.close()
    assert (after.used(RULES[1].key), after.reserved(RULES[1].key), after.open_leases) == (100, 200, 2)
    events = [entry["event"] for entry in logs]
    assert events.count("journal_failing") == events.count("journal_recovered") == 1
    assert events.count("journal_refusing") == events.count("journal_admitting") == 1


def test_serve_goes_on_and_drops_only_the_oldest_rows_beyond_the_bound(broken, tmp_path: Path):
    journal = Journal(tmp_path, JournalSettings(on_failure="serve", grace_s=0.1, max_queued=100))
    ledger, store = SqliteLedger(journal), MemoryStore(clock=Clock(), journal=journal)
    journal.start()
    assert journal.flush()
    with broken(journal):
        ledger.append(record("first"))
        until(lambda: not journal.status.ok)
        for n in range(400):
            ledger.append(record(f"r{n:03}"))
        store.settle(admitted(store.reserve("a", RULES, ONE, ttl_s=600)), ONE)
        until(lambda: journal.status.dropped)
        assert not journal.refusing
        store.settle(admitted(store.reserve("b", RULES, ONE, ttl_s=600)), ONE)
        journal.check()
        assert journal.status.queued <= 100
    until(lambda: journal.status.ok)
    dropped = journal.status.dropped
    assert journal.close()
    kept = [row.id for row in query(tmp_path)]
    assert len(kept) == 401 - dropped
    assert "r399" in kept
    assert "r000" not in kept
    journal = Journal(tmp_path)
    assert MemoryStore(clock=Clock(), journal=journal).used(RULES[1].key) == 200
    journal.close()


def test_backlog_over_the_bound_refuses_before_memory_grows(tmp_path: Path):
    journal = Journal(tmp_path, JournalSettings(grace_s=60, max_queued=100))
    store, ledger = MemoryStore(clock=Clock(), journal=journal), SqliteLedger(journal)
    with locked(journal.path):
        journal.start()
        for n in range(150):
            ledger.append(record(f"r{n}"))
        until(lambda: journal.refusing)
        with pytest.raises(StoreUnavailable):
            store.reserve("a", RULES, ONE, ttl_s=600)
    until(lambda: not journal.refusing)
    assert journal.close()
    assert len(query(tmp_path)) == 150


def test_writer_that_hangs_in_the_disk_is_noticed_from_the_loop(tmp_path: Path):
    journal = Journal(tmp_path, JournalSettings(grace_s=0.0))
    journal._flush_began = time.monotonic() - 4
    journal.check()
    assert not journal.refusing
    journal._flush_began = time.monotonic() - 6
    journal.check()
    assert journal.refusing
    assert journal.status.reason == "stalled"
    assert journal._flush()
    journal.close()
    assert not journal.refusing


def test_short_foreign_write_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "BUSY_PATIENCE_S", 60.0)  # as long as it lasts here, it is short
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    with capture_logs() as logs:
        with locked(journal.path):
            ledger.append(record("a"))
            until(lambda: journal._stuck_from is not None)
        assert journal.flush()
    assert logs == []
    journal.close()


def test_close_tells_what_could_not_be_written(tmp_path: Path):
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    with locked(journal.path):
        ledger.append(record("a"))
        assert not journal.close(timeout_s=0.2)
    journal.close()  # on a busy machine its thread may have been alive still
    Journal(tmp_path).close()


def test_row_that_sqlite_can_never_take_holds_back_no_other(tmp_path: Path):
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    for bad in (record("bad1", model="\ud800"), record("bad2", prompt_tokens=1 << 70), record("bad3", token=None)):
        ledger.append(record(f"before {bad.id}"))
        ledger.append(bad)
    ledger.append(record("last"))
    assert journal.flush()
    assert journal.status.rejected == 3
    assert journal.status.ok
    assert journal.close()
    assert {row.id for row in query(tmp_path)} == {"before bad1", "before bad2", "before bad3", "last"}


def test_second_process_is_refused_with_the_owner_named(tmp_path: Path):
    journal = Journal(tmp_path)
    script = f"from pathlib import Path; from extproc.journal.writer import Journal; Journal(Path({str(tmp_path)!r}))"
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert f"StateInUse: {tmp_path} is in use by process {os.getpid()}" in second.stderr
    with pytest.raises(StateInUse):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_damaged_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "arks.db").write_bytes(b"not a database at all, but long enough to look at" * 100)
    with pytest.raises(StateUnreadable, match=r"arks\.db cannot be used \(SQLITE_NOTADB\)"):
        Journal(tmp_path)
    # The lock is free again.
    (tmp_path / "arks.db").unlink()
    Journal(tmp_path).close()


def test_damaged_pages_are_found_at_the_start(tmp_path: Path):
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    for n in range(2000):
        ledger.append(record(f"r{n}"))
    assert journal.close()
    path = tmp_path / "arks.db"
    content = bytearray(path.read_bytes())
    content[40_000:120_000] = b"\xff" * 80_000
    path.write_bytes(content)
    with pytest.raises(StateUnreadable, match=r"arks\.db"):
        Journal(tmp_path)


def test_state_of_a_later_version_is_not_touched(tmp_path: Path):
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / "arks.db")
    db.execute("UPDATE schema_version SET version = 99")
    db.commit()
    db.close()
    with pytest.raises(StateTooNew, match=r"arks\.db has schema 99"):
        Journal(tmp_path)


def test_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnreadable, match=r"file/arks\.lock"):
        Journal(tmp_path / "file")


def test_file_that_someone_holds_locked_at_the_start_is_said_to_be(tmp_path: Path):
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / "arks.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateUnreadable, match=r"SQLITE_BUSY.*: another program holds it locked"):
        Journal(tmp_path)
    db.close()
