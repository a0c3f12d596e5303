"""The state directory: `arks.lock`, held for life by the one process that may write, and `arks.db`.

The lock is a flock: the kernel drops it with the process, so nothing is left behind by `kill -9`. It also remembers
that there was a database: where that is missing, or empty, it was lost, and a start would give every quota anew.
"""

import contextlib
import fcntl
import os
import sqlite3
from pathlib import Path
from typing import TextIO

from extproc.journal import schema
from extproc.journal.errors import StateInUse, StateTooNew, StateUnreadable

DATABASE = "arks.db"
LOCK = "arks.lock"
_MADE = f"made {DATABASE}"
"""the lock's second line, once there is a database"""
CHECK_BELOW_BYTES = 64 << 20
"""a full integrity check of a file this size takes well below a second; of a larger one it would hold up the start"""
BUSY_TIMEOUT_S = 0.05
"""short, because the writer has its own retries"""
START_BUSY_TIMEOUT_S = 2.0
_DAMAGED = "restore it, or move it away to start with empty counters"
_LOST = f"restore it, or remove {LOCK} beside it to start with empty counters"
_ADVICE = {
    "SQLITE_BUSY": "another program holds it locked",
    "SQLITE_CANTOPEN": "no permission, or not a file",
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "no permission to write",
}


def lock(state_dir: Path) -> TextIO:
    """Raises: StateInUse, StateUnreadable."""
    path = state_dir / LOCK
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        held = path.open("a+", encoding="ascii")
    except OSError as error:
        raise StateUnreadable(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.seek(0)
        owner = held.readline(20).strip() or "unknown"
        held.close()
        raise StateInUse(f"{state_dir} is in use by process {owner}: one gateway per directory") from error
    _write_lock(held, made=was_made(held))
    return held


def was_made(held: TextIO) -> bool:
    """Whether a process that held this lock has made the database."""
    held.seek(0)
    return _MADE in held.read().splitlines()


def mark_made(held: TextIO) -> None:
    _write_lock(held, made=True)


def _write_lock(held: TextIO, *, made: bool) -> None:
    # The owner's pid only serves a message, the mark only who lost the database: a full disk is no reason to give up.
    with contextlib.suppress(OSError):
        held.truncate(0)
        held.write(f"{os.getpid()}\n" + (f"{_MADE}\n" if made else ""))
        held.flush()


def reason(error: sqlite3.Error) -> str:
    """SQLite's own name of the failure; its messages may quote what was written."""
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


def unreadable(path: Path, error: sqlite3.Error) -> StateUnreadable:
    name = reason(error)
    return StateUnreadable(f"{path} cannot be used ({name}): {_ADVICE.get(name, _DAMAGED)}")


def connect(path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S, *, create: bool = False) -> sqlite3.Connection:
    """A writing connection, statements cached for every chunk size.

    WAL with synchronous NORMAL: a transaction is safe from the death of the process as soon as it is committed, and
    from the death of the machine at the next checkpoint, which is `Checkpointer`'s.
    """
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}",
        uri=True,
        timeout=busy_timeout_s,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA journal_size_limit = 67108864")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_database(path: Path, *, was_there: bool = False) -> sqlite3.Connection:
    """Made where there is none, unless it was there before. Raises: StateUnreadable, StateTooNew."""
    connection: sqlite3.Connection | None = None
    try:
        if was_there and not path.exists():
            raise StateUnreadable(f"{path} is gone: {_LOST}")
        connection = connect(path, busy_timeout_s=START_BUSY_TIMEOUT_S, create=True)
        found = schema.version(connection)
        if was_there and not found:
            raise StateUnreadable(f"{path} is empty: {_LOST}")
        if found > schema.VERSION:
            raise StateTooNew(f"{path} has schema {found}; this program knows up to {schema.VERSION}: use a newer one")
        if path.stat().st_size < CHECK_BELOW_BYTES:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise StateUnreadable(f"{path} is damaged: {_DAMAGED}")
        schema.migrate(connection)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000:.0f}")
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise unreadable(path, error) from error
        raise
    return connection


def check(db: sqlite3.Connection) -> None:
    """Read all of it again. Raises sqlite3.DatabaseError where it is not whole."""
    # What the connection remembers of lost pages proves nothing.
    db.execute("PRAGMA shrink_memory")
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("not whole")


def put_back(db: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """The connection to a new file of all that `db` holds, whose own was taken away. What lies there is kept aside.

    Raises: sqlite3.Error, OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(fresh),))
    # A log that is left would be taken for the new file's.
    for log in ("-wal", "-shm"):
        path.with_name(path.name + log).unlink(missing_ok=True)
    if path.exists():
        path.replace(path.with_name(f"{path.name}.aside"))
    fresh.replace(path)
    found = connect(path)
    # SQLite sees that this one's file has moved, and leaves the names alone.
    db.close()
    return found
