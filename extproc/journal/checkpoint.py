"""Moves the write-ahead log into the database, beside the writer.

A checkpoint waits for the disk (fsync); inside the writer that wait would delay usage rows by far more than the 100 ms
that a crash may cost. A passive checkpoint does not hold the writer up. It only rarely ends with nothing left, though,
while rows keep coming; when the log has grown large, a restarting one follows, which holds the writer for the rest.
"""

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

from extproc.journal import file

LOOK_S = 1.0
DUE_ROWS = 50_000
DUE_S = 30.0
"""the first write after a checkpoint waits for the disk, too: so there are few of them"""
LARGE_PAGES = 16_384
"""64 MiB"""


class Checkpointer:
    """Owner of one thread and one connection. Failures are the writer's to notice: it fills the same disk."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        """written since the last checkpoint; the writer counts them up"""
        self._path = path
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal-checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(LOOK_S):
            if self.rows >= DUE_ROWS or (self.rows and time.monotonic() - last >= DUE_S):
                self.rows = 0
                with contextlib.suppress(sqlite3.Error):
                    self._checkpoint()
                last = time.monotonic()

    def _checkpoint(self) -> None:
        with contextlib.closing(file.connect(self._path)) as db:
            for mode in ("PASSIVE", "PASSIVE", "RESTART"):
                _, pages, moved = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                if moved == pages or pages < LARGE_PAGES or self._stopping.is_set():
                    return
