"""The journal: carries what its sources collect into `arks.db`, in one transaction every few hundredths of a second.

Life cycle: `Journal(state_dir)` takes the directory's lock and opens the file; sources attach and read what the last
process left; `start` begins to write; `close` writes the rest and gives the lock back.

Every SQLite call gives up the interpreter lock and must win it back from a busy event loop. So a transaction is few
calls with many rows each: chunks of a few dozen sizes, so that each is prepared once, the last one filled up by
repeating its last row. That is harmless: every write is idempotent.

A file that somebody takes away meanwhile is put back, with all that it held: see `vigil`.

Failure: what could not be written stays with its source and is tried again with backoff, for ever. `refusing` turns
true under the `refuse` policy after `grace_s` of failure, or when more than `max_queued` entries wait; under `serve`
the sources shed what they may. A writer that hangs inside the disk is noticed by `check`, called from the loop.
"""

import functools
import itertools
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import structlog

from extproc.journal import file
from extproc.journal.checkpoint import Checkpointer
from extproc.journal.model import JournalSettings, JournalStatus, Row, Source, Statement
from extproc.journal.retention import Retention
from extproc.journal.vigil import Vigil

CHUNK_ROWS = 1024
"""times the widest table's 20 columns stays below SQLite's 32 766 variables"""
BATCH_ROWS = 16_384
"""in one transaction from one source: a backlog is worked off in pieces that each take well below a second"""
LOOK_S = 1.0
"""how long a loss of the file may go unseen while there is nothing to write"""
STALL_S = 5.0
"""one transaction may take as long on a disk that is busy with others"""
SWITCH_INTERVAL_S = 50e-6
"""A thread that waits for the interpreter lock only insists on it after a whole interval in which nobody let it go. A
busy uvloop lets it go, and takes it back at once, several times in the default of 5 ms: this thread then waits for
seconds. Measured at 20 000 rows/s beside a loop without rest: no flush in 3 s before, one every 40 ms so."""
GATHER_MIN_S = 0.01
BUSY_PATIENCE_S = 0.3
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 0.5


class Journal:
    """Owner of `<state>/arks.db` and of the thread that writes it. Raises JournalError when made."""

    def __init__(self, state_dir: Path, settings: JournalSettings | None = None) -> None:
        self.settings = settings or JournalSettings()
        self.path = state_dir / file.DATABASE
        self.idle = True
        """sources call `wake` after an append that finds this true"""
        self.refusing = False
        self._lock_file = file.lock(state_dir)
        try:
            self._db = file.open_database(self.path, was_there=file.was_made(self._lock_file))
        except BaseException:
            self._lock_file.close()
            raise
        file.mark_made(self._lock_file)
        self._vigil = Vigil(self.path)
        self._sources: list[Source] = []
        self._retention = Retention(self.settings.retain_days)
        self._checkpointer = Checkpointer(self.path)
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self._hurry = threading.Event()
        self._durable = threading.Condition()
        self._asked = 0
        self._done = 0
        self._stopping = False
        self._stop_at = 0.0
        self._flush_began: float | None = None
        self._ok = True
        self._since_s = time.time()
        self._stuck_from: float | None = None
        self._failing_from: float | None = None
        self._reason = ""
        self._dropped = 0
        self._rejected = 0
        self._written = 0
        self._log = structlog.get_logger("journal")

    # -- before start

    def attach(self, source: Source) -> None:
        """In the order in which their rows are written."""
        assert self._thread is None
        self._sources.append(source)

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """For a source to read, or tidy up, what the last process left. Raises StateUnreadable."""
        assert self._thread is None
        try:
            return self._db.execute(sql).fetchall()
        except sqlite3.Error as error:
            raise file.unreadable(self.path, error) from error

    def start(self) -> None:
        """Begin to write. Shortens the interpreter's switch interval, for the whole process."""
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()
        self._checkpointer.start()

    # -- from the event loop

    def wake(self) -> None:
        """There is something to write. Costs a lock: only for the first entry after `idle`."""
        self.idle = False
        self._work.set()

    def check(self) -> None:
        """Notice a writer that hangs, and hold the bound while it does. Once a second, from the loop."""
        began = self._flush_began
        if began is not None and time.monotonic() - began > max(STALL_S, self.settings.grace_s):
            self._failed("stalled", began)
        self._hold_bound()

    @property
    def status(self) -> JournalStatus:
        return JournalStatus(
            ok=self._ok,
            since_s=self._since_s,
            reason=self._reason,
            refusing=self.refusing,
            queued=self._queued(),
            dropped=self._dropped,
            rejected=self._rejected,
            written=self._written,
        )

    # -- blocking; not for the event loop

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything queued before this call is durable."""
        with self._durable:
            self._asked += 1
            ticket = self._asked
            self._hurry.set()
            self.wake()
            return self._durable.wait_for(lambda: self._done >= ticket, timeout_s)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Write the rest, at most until `timeout_s`, and give the directory back. False: some could not be written."""
        if self._thread is not None:
            self._stop_at = time.monotonic() + timeout_s
            self._stopping = True
            self._hurry.set()
            self.wake()
            self._thread.join(timeout_s + 1.0)
            if self._thread.is_alive():
                # It hangs inside the disk: closing under it would crash the interpreter, so the process's end does it.
                return False
            self._checkpointer.close(timeout_s)
        left = self._queued()
        self._db.close()
        self._lock_file.close()
        return left == 0

    # -- the writer thread

    def _run(self) -> None:
        backoff_s = 0.0
        last = 0.0
        while True:
            if not backoff_s and not self._stopping:
                self._work.wait(min(self._retention.wait_s, LOOK_S))
            # Gather what the next moments bring, unless someone waits for durability.
            gather_s = max(GATHER_MIN_S, last + self.settings.flush_interval_s - time.monotonic())
            self._hurry.wait(backoff_s or gather_s)
            self._hurry.clear()
            self._work.clear()
            # From here on an append wakes the next round, also when this one still takes it along.
            self.idle = True
            ticket = self._asked
            last = time.monotonic()
            if self._flush():
                backoff_s = 0.0
                with self._durable:
                    self._done = ticket
                    self._durable.notify_all()
            else:
                backoff_s = min(max(2 * backoff_s, BACKOFF_MIN_S), BACKOFF_MAX_S)
            if self._stopping and (not self._queued() or time.monotonic() > self._stop_at):
                return

    def _flush(self) -> bool:
        """Everything queued at the call, a bounded batch in each transaction. False: it failed, see `status`."""
        try:
            self._flush_began = time.monotonic()
            if self._vigil.gone():
                self._put_back()
            if self._vigil.shrunk():
                file.check(self._db)
                self._vigil.accept()
            for _ in range(1 + self._queued() // BATCH_ROWS):
                self._flush_began = time.monotonic()
                for source in self._sources:
                    source.collect()
                self._transact([write for source in self._sources for write in source.writes()])
                for source in self._sources:
                    source.wrote()
            self._stuck_from = None
            if not self._ok:
                self._recovered()
            elif self.refusing:
                self._hold_bound()
            self._retention.step(self._db)
        except Exception as error:
            self._give_up(error)
            return False
        finally:
            self._flush_began = None
        return True

    def _transact(self, writes: list[tuple[Statement, list[Row]]]) -> None:
        if not writes and self._ok:
            return
        self._db.execute("BEGIN IMMEDIATE")
        for statement, rows in writes:
            self._write(statement, rows)
        self._db.execute("COMMIT")
        count = sum(len(rows) for _, rows in writes)
        self._written += count
        self._checkpointer.rows += count

    def _write(self, statement: Statement, rows: list[Row]) -> None:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            size = _chunk_rows(len(chunk))
            chunk.extend([chunk[-1]] * (size - len(chunk)))
            try:
                self._db.execute(_sql(statement, size), list(itertools.chain.from_iterable(chunk)))
            except (sqlite3.DatabaseError, ValueError, OverflowError) as error:
                if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
                    raise
                # A value that SQLite can never take must not hold back the rest.
                self._write_singly(statement, dict.fromkeys(map(tuple, chunk)))

    def _write_singly(self, statement: Statement, rows: dict[tuple[Any, ...], None]) -> None:
        for row in rows:
            try:
                self._db.execute(_sql(statement, 1), row)
            except (sqlite3.DatabaseError, ValueError, OverflowError) as error:
                if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
                    raise
                self._rejected += 1
                self._log.error("journal_row_rejected", reason=type(error).__name__)

    def _give_up(self, error: Exception) -> None:
        now = time.monotonic()
        self._stuck_from = self._stuck_from or now
        why = file.reason(error) if isinstance(error, sqlite3.Error) else type(error).__name__
        # Someone else's short write, or a checkpoint's end, is no failure worth a word.
        if why != "SQLITE_BUSY" or now - self._stuck_from > BUSY_PATIENCE_S:
            self._failed(why, self._stuck_from)
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error:
            self._reopen()
        self._hold_bound()

    def _put_back(self) -> None:
        self._log.error("journal_taken_away", path=str(self.path))
        self._db = file.put_back(self._db, self.path)
        self._vigil = Vigil(self.path)
        self._log.warning("journal_put_back", path=str(self.path))

    def _reopen(self) -> None:
        """After a failed rollback the connection's state is unknown; a fresh one either works or fails plainly."""
        try:
            fresh = file.connect(self.path)
        except sqlite3.Error:
            return
        self._db.close()
        self._db = fresh

    # -- state, from both threads; each assignment is one step

    def _failed(self, why: str, began: float) -> None:
        if self._failing_from is None:
            self._failing_from = began
        if self._ok or self._reason != why:
            self._log.error("journal_failing", reason=why, policy=self.settings.on_failure, queued=self._queued())
        if self._ok:
            self._since_s = time.time()
        self._ok = False
        self._reason = why

    def _recovered(self) -> None:
        self._failing_from = None
        self._log.info("journal_recovered", failing_s=round(time.time() - self._since_s, 1), dropped=self._dropped)
        self._since_s = time.time()
        self._hold_bound()
        self._ok = True  # last: who is told so is admitted

    def _hold_bound(self) -> None:
        excess = self._queued() - self.settings.max_queued
        if self.settings.on_failure == "serve":
            if excess > 0:
                self._dropped += sum(source.shed(excess) for source in self._sources)
            return
        failing = self._failing_from
        refusing = excess > 0 or (failing is not None and time.monotonic() - failing >= self.settings.grace_s)
        if refusing != self.refusing:
            self.refusing = refusing
            self._log.warning("journal_refusing" if refusing else "journal_admitting", queued=self._queued())

    def _queued(self) -> int:
        return sum(source.depth() for source in self._sources)


def _chunk_rows(rows: int) -> int:
    """The next size with three significant bits: at most a fifth more than `rows`."""
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step


@functools.cache
def _sql(statement: Statement, rows: int) -> str:
    row = "(" + ",".join("?" * statement.columns) + ")"
    return f"{statement.head} {','.join([row] * rows)} {statement.tail}"
