"""The embedded ledger: usage rows, carried by the journal into the table `usage`.

`append` puts the record on a list; the journal's thread takes it from there. The primary key (id, attempt) makes a
second append of the same event harmless. Two kinds of rows may be replaced: the estimate that an expired lease leaves
behind, when its request ends after all; and a broken-off request's, once it is known why it broke off.

Under the journal's `serve` policy the oldest rows are dropped beyond its bound, and counted.
"""

import threading

from msgspec.structs import astuple

from extproc.journal.model import Row, Statement
from extproc.journal.writer import BATCH_ROWS, Journal
from extproc.ledger.model import BROKEN_OFF, LEASE_EXPIRED, UsageRecord

COLUMNS = UsageRecord.__struct_fields__
_INSERT = Statement(
    head=f"INSERT INTO usage ({', '.join(COLUMNS)}) VALUES",
    columns=len(COLUMNS),
    tail="ON CONFLICT (id, attempt) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in {"id", "attempt"})
    + f" WHERE usage.error IN ('{LEASE_EXPIRED}', '{BROKEN_OFF}') AND excluded.error <> usage.error"
    + f" AND excluded.error <> '{LEASE_EXPIRED}'",
)


class SqliteLedger:
    """Implements `Ledger`. `append` belongs to the event loop; the rest to the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: list[UsageRecord] = []
        self._batch: list[UsageRecord] = []
        self._taking = threading.Lock()
        self.written = 0
        """rows in the table by now, since the start; a row is counted at its last word"""
        journal.attach(self)

    def append(self, record: UsageRecord) -> None:
        """Queue the row; durable within 100 ms. Never blocks."""
        self._queue.append(record)
        if self._journal.idle:
            self._journal.wake()

    def collect(self) -> None:
        if not self._batch:
            with self._taking:
                self._batch = self._queue[:BATCH_ROWS]
                del self._queue[: len(self._batch)]

    def writes(self) -> list[tuple[Statement, list[Row]]]:
        rows: list[Row] = list(map(astuple, self._batch))
        return [(_INSERT, rows)] if rows else []

    def wrote(self) -> None:
        self.written += sum(record.error != BROKEN_OFF for record in self._batch)
        self._batch = []

    def depth(self) -> int:
        return len(self._queue) + len(self._batch)

    def shed(self, excess: int) -> int:
        with self._taking:
            dropped = min(excess, len(self._queue))
            del self._queue[:dropped]
        return dropped
