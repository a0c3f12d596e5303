"""Moves the write-ahead log into the database, beside the writer.

A checkpoint waits for the disk (fsync); inside the writer that wait would delay usage rows by far more than the 100 ms
that a crash may cost. A passive checkpoint does not hold the writer up. It only rarely ends with nothing left, though,
while rows keep coming; when the log has grown large, a restarting one follows, which holds the writer for the rest.
"""

import contextlib
import sqlite3
import threading
from pathlib import Path

from extproc.journal import file

REST_S = 2.0
"""between checkpoints"""
LARGE_PAGES = 16_384
"""64 MiB"""


class Checkpointer:
    """Owner of one thread and one connection. Failures are the writer's to notice: it fills the same disk."""

    def __init__(self, path: Path) -> None:
        self.due = False
        """set by the writer after each transaction"""
        self._path = path
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal-checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(REST_S):
            if self.due:
                self.due = False
                with contextlib.suppress(sqlite3.Error):
                    self._checkpoint()

    def _checkpoint(self) -> None:
        with contextlib.closing(file.connect(self._path)) as db:
            for mode in ("PASSIVE", "PASSIVE", "RESTART"):
                _, pages, moved = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                if moved == pages or pages < LARGE_PAGES or self._stopping.is_set():
                    return
