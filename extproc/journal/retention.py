"""Deletes what nobody needs any more, on the writer thread, in pieces so small that no flush waits for long."""

import sqlite3
import time

PIECE_ROWS = 500
REST_S = 60.0
BETWEEN_PIECES_S = 0.25
_DAY_MS = 86_400_000


class Retention:
    """Old usage rows, where the operator set an age, and the counters of windows that have ended."""

    def __init__(self, retain_days: int | None) -> None:
        self.wait_s = BETWEEN_PIECES_S
        """until the next step is due"""
        self._retain_days = retain_days
        self._due = 0.0

    def step(self, db: sqlite3.Connection) -> None:
        """At most one piece of each kind; nothing at all before it is due."""
        if time.monotonic() < self._due:
            return
        now_s = time.time()
        # A window's row is kept for one more window: a clock that is set back a little finds it again.
        gone = db.execute(
            "DELETE FROM counters WHERE key IN"
            " (SELECT key FROM counters WHERE window_s > 0 AND start_s + 2 * window_s < ? LIMIT ?)",
            (now_s, PIECE_ROWS),
        ).rowcount
        if self._retain_days is not None:
            before_ms = int(now_s * 1000) - self._retain_days * _DAY_MS
            gone = max(
                gone,
                db.execute(
                    "DELETE FROM usage WHERE (id, attempt) IN"
                    " (SELECT id, attempt FROM usage WHERE time_ms < ? ORDER BY time_ms LIMIT ?)",
                    (before_ms, PIECE_ROWS),
                ).rowcount,
            )
        self.wait_s = BETWEEN_PIECES_S if gone == PIECE_ROWS else REST_S
        self._due = time.monotonic() + self.wait_s
