import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.journal import writer
from extproc.journal.model import JournalSettings
from extproc.journal.retention import Retention
from extproc.journal.writer import CHUNK_ROWS, Journal
from extproc.ledger.model import BROKEN_OFF, LEASE_EXPIRED, UsageRecord
from extproc.ledger.query import LedgerUnreadable, Totals, query, totals
from extproc.ledger.sqlite import SqliteLedger
from tests.limits.ground import NOON, record


@pytest.fixture
def journal(tmp_path: Path):
    journal = Journal(tmp_path)
    yield journal
    journal.close()


@pytest.fixture
def ledger(journal: Journal) -> SqliteLedger:
    ledger = SqliteLedger(journal)
    journal.start()
    return ledger


class Patience(threading.Event):
    """Writes down how long it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked_s.append(timeout)
        return super().wait(timeout)


def test_row_is_durable_within_100_ms_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By what the writer waits for, not by how long it took: how soon it runs is the machine's."""
    # An idle writer would look by itself in an hour: a row it was not woken for would not be written here.
    monkeypatch.setattr(writer, "LOOK_S", 3600.0)
    journal = Journal(tmp_path)
    journal._retention.wait_s = 3600.0
    journal._hurry = Patience()
    ledger = SqliteLedger(journal)
    journal.start()
    row = record("a", ttft_ms=None, stream=False, accuracy="estimated", error="client_left")
    for each in (row, *(record(f"r{n}", time_ms=NOON * 1000 + n) for n in range(5))):
        ledger.append(each)
        end = time.monotonic() + 60
        while journal.status.queued:
            assert time.monotonic() < end, "nobody woke the writer"
            time.sleep(0.001)
    asked_s = list(journal._hurry.asked_s)
    assert journal.close()
    assert len(asked_s) >= 6
    assert max(asked_s) <= JournalSettings().flush_interval_s <= 0.05
    assert query(tmp_path)[0] == row


def test_same_event_twice_is_one_row_and_the_first_stands(journal: Journal, ledger: SqliteLedger, tmp_path: Path):
    ledger.append(record("a", status=200))
    ledger.append(record("a", status=500))
    assert journal.flush()
    ledger.append(record("a", status=502))
    ledger.append(record("a", attempt=2))
    assert journal.flush()
    assert [(row.attempt, row.status) for row in query(tmp_path)] == [(1, 200), (2, 200)]


def test_truth_replaces_the_estimate_of_an_expired_lease_and_never_the_reverse(
    journal: Journal, ledger: SqliteLedger, tmp_path: Path
):
    expired = record("a", status=0, completion_tokens=4096, accuracy="estimated", error=LEASE_EXPIRED)
    ledger.append(expired)
    assert journal.flush()
    ledger.append(record("a"))
    ledger.append(expired)
    assert journal.flush()
    assert query(tmp_path) == [record("a")]


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS - 1])
def test_every_batch_size_is_written_whole(journal: Journal, ledger: SqliteLedger, tmp_path: Path, count: int):
    for n in range(count):
        ledger.append(record(f"r{n}", prompt_tokens=n))
    assert journal.flush()
    assert sorted(row.prompt_tokens for row in query(tmp_path)) == list(range(count))


text = st.text(st.characters(codec="utf-8"), max_size=20)
count = st.integers(0, (1 << 63) - 1)


@settings(max_examples=25, deadline=None)
@given(
    row=st.builds(
        UsageRecord, id=text, attempt=st.integers(1, 2), request_id=text, time_ms=count, token=text, namespace=text,
        model=text, endpoint=text, engine=text, status=st.integers(0, 599), prompt_tokens=count,
        completion_tokens=count, cached_tokens=count, reasoning_tokens=count,
        accuracy=st.sampled_from(["exact", "estimated"]), stream=st.booleans(), duration_ms=count,
        ttft_ms=st.none() | count, error=text,
    )
)  # fmt: skip
def test_any_record_comes_back_as_it_went(row: UsageRecord, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("state")
    journal = Journal(folder)
    SqliteLedger(journal).append(row)
    assert journal._flush()
    journal.close()
    assert query(folder) == [row]


def fill(journal: Journal, ledger: SqliteLedger) -> None:
    for n in range(20):
        ledger.append(
            record(
                f"r{n:02}",
                time_ms=(NOON + n) * 1000,
                token=f"token-{n % 2}",
                namespace="a" if n < 10 else "b",
                model=f"model-{n % 5}",
                accuracy="exact" if n % 4 else "estimated",
                error="" if n % 3 else "engine_lost",
            )
        )
    assert journal.flush()


def test_query_filters_limits_and_orders(journal: Journal, ledger: SqliteLedger, tmp_path: Path):
    fill(journal, ledger)

    def ids(**terms) -> list[int]:
        return [int(row.id[1:]) for row in query(tmp_path, **terms)]

    assert ids() == list(range(20))
    assert ids(limit=3) == [17, 18, 19]
    assert ids(since_s=NOON + 5, until_s=NOON + 8) == [5, 6, 7]
    assert ids(token="token-1", namespace="b") == [11, 13, 15, 17, 19]
    assert ids(model="model-3", limit=2) == [13, 18]
    assert ids(request_id="x-r04") == [4]
    assert ids(token="token-1' OR 1=1 --") == []


def test_totals_sum_each_token_and_model(journal: Journal, ledger: SqliteLedger, tmp_path: Path):
    fill(journal, ledger)
    sums = totals(tmp_path, namespace="a", token="token-0")
    assert sums[0] == Totals("a", "token-0", "model-0", 1, 1, 1, 12, 34, 5, 6)
    assert sum(line.requests for line in totals(tmp_path)) == 20
    assert sum(line.failed for line in totals(tmp_path)) == 7
    assert sum(line.estimated for line in totals(tmp_path)) == 5


def test_other_process_reads_while_the_gateway_writes(journal: Journal, ledger: SqliteLedger, tmp_path: Path):
    fill(journal, ledger)
    script = (
        f"from pathlib import Path; from extproc.ledger.query import query;print(len(query(Path({str(tmp_path)!r}))))"
    )
    ledger.append(record("unflushed"))
    seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(seen.stdout) in {20, 21}
    ledger.append(record("still writes"))
    assert journal.flush()


def test_no_ledger_and_a_damaged_one_are_told_apart(tmp_path: Path):
    with pytest.raises(LedgerUnreadable, match="no ledger here"):
        query(tmp_path)
    (tmp_path / "arks.db").write_bytes(b"x" * 5000)
    with pytest.raises(LedgerUnreadable, match="SQLITE_NOTADB"):
        totals(tmp_path)


def test_ledger_of_a_later_version_is_not_guessed_at(tmp_path: Path):
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / "arks.db")
    db.execute("UPDATE schema_version SET version = 99")
    db.commit()
    db.close()
    with pytest.raises(LedgerUnreadable, match="schema 99"):
        query(tmp_path)


def test_old_rows_go_in_pieces_and_only_where_an_age_is_set(tmp_path: Path):
    journal = Journal(tmp_path, JournalSettings(retain_days=30))
    ledger = SqliteLedger(journal)
    old_ms = int(time.time() * 1000) - 31 * 86_400_000
    for n in range(1200):
        ledger.append(record(f"old{n}", time_ms=old_ms + n))
    ledger.append(record("young", time_ms=old_ms + 2 * 86_400_000))
    left = []
    for _ in range(4):
        journal._retention._due = 0
        assert journal._flush()
        left.append(len(query(tmp_path)))
    assert left == [701, 201, 1, 1]
    journal._retention = Retention(None)
    ledger.append(record("ancient", time_ms=1))
    assert journal._flush()
    assert len(query(tmp_path)) == 2
    journal.close()


def test_counters_of_ended_windows_leave_the_file(tmp_path: Path):
    journal = Journal(tmp_path)
    now_s = int(time.time())
    for key, window_s, start_s in (("gone", 60, now_s - 200), ("now", 60, now_s - now_s % 60), ("quota", 0, 0)):
        journal.execute(f"INSERT INTO counters VALUES ('{key}', {window_s}, {start_s}, 5)")
    assert journal._flush()
    assert {key for (key,) in journal.execute("SELECT key FROM counters")} == {"now", "quota"}
    journal.close()


def test_log_is_folded_into_the_file_beside_the_writer(journal: Journal, ledger: SqliteLedger, tmp_path: Path):
    for n in range(5000):
        ledger.append(record(f"r{n}"))
    assert journal.flush()
    assert journal._checkpointer.rows == 5000
    journal._checkpointer._checkpoint()
    assert (tmp_path / "arks.db").stat().st_size > 500_000
    ledger.append(record("after"))
    assert journal.flush()
    assert len(query(tmp_path)) == 5001


def test_loop_without_rest_does_not_starve_the_writer(journal: Journal, ledger: SqliteLedger):
    """A loop that lets the interpreter go and takes it back at once, as a saturated server does."""
    flushes = appended = 0
    flush = journal._flush

    def counted() -> bool:
        nonlocal flushes
        flushes += 1
        return flush()

    journal._flush = counted

    async def serve() -> None:
        nonlocal appended
        # Of this thread's own processor time: others may keep it from running for seconds.
        end = time.thread_time() + 2
        while time.thread_time() < end:
            appended += 1
            ledger.append(record(f"r{time.monotonic_ns()}"))
            busy = time.thread_time() + 0.001
            while time.thread_time() < busy:
                sum(range(50))
            await asyncio.sleep(0)

    uvloop.run(serve())
    assert flushes > 10
    assert journal.status.written > appended // 2


def test_a_broken_off_row_gets_its_last_word_and_keeps_it(tmp_path):
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    journal.start()
    first = record("a", status=499, accuracy="estimated", error=BROKEN_OFF)
    ledger.append(first)
    assert journal.flush()
    assert query(tmp_path) == [first]
    # Both in one transaction, and in two.
    last = record("a", status=502, accuracy="estimated", error="engine_lost")
    ledger.append(record("b", status=499, accuracy="estimated", error=BROKEN_OFF))
    ledger.append(record("b", status=499, accuracy="estimated", error="client_disconnected"))
    ledger.append(last)
    ledger.append(first)
    assert journal.flush()
    rows = {row.id: row for row in query(tmp_path)}
    assert rows["a"] == last
    assert rows["b"].error == "client_disconnected"
    journal.close()
