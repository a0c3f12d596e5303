"""Reads the embedded ledger from outside: `arks usage`, while the gateway runs or after it stopped.

Each call opens the file read-only and closes it again, so that a reader never holds back the writer's checkpoints.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from extproc.journal import schema
from extproc.journal.file import DATABASE
from extproc.ledger.model import Accuracy, UsageRecord
from extproc.ledger.sqlite import COLUMNS

READ_TIMEOUT_S = 5.0


class LedgerUnreadable(Exception):  # noqa: N818 - a state of the file
    """Names the file and the reason."""


class Totals(NamedTuple):
    """Sums over rows; `estimated` counts the rows whose tokens are estimates, `failed` those with an error."""

    namespace: str
    token: str
    model: str
    requests: int
    failed: int
    estimated: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int


def query(
    state_dir: Path,
    *,
    since_s: float | None = None,
    until_s: float | None = None,
    token: str | None = None,
    namespace: str | None = None,
    model: str | None = None,
    request_id: str | None = None,
    limit: int | None = None,
) -> list[UsageRecord]:
    """Rows by time of admission, the latest `limit` of them, oldest first. Raises LedgerUnreadable.

    A window of time is [since_s, until_s), Unix seconds. Names are exact.
    """
    where, values = _where(since_s, until_s, token, namespace, model, request_id)
    sql = f"SELECT {', '.join(COLUMNS)} FROM usage{where} ORDER BY time_ms DESC, id DESC, attempt DESC LIMIT ?"  # noqa: S608 - constants
    with _reading(state_dir) as db:
        rows = db.execute(sql, [*values, -1 if limit is None else limit]).fetchall()
    return [_record(row) for row in reversed(rows)]


def totals(
    state_dir: Path,
    *,
    since_s: float | None = None,
    until_s: float | None = None,
    token: str | None = None,
    namespace: str | None = None,
    model: str | None = None,
) -> list[Totals]:
    """One sum for each namespace, token and model. Raises LedgerUnreadable."""
    where, values = _where(since_s, until_s, token, namespace, model, None)
    sql = (
        "SELECT namespace, token, model, count(*), sum(error <> ''), sum(accuracy = 'estimated'), sum(prompt_tokens),"  # noqa: S608 - constants
        " sum(completion_tokens), sum(cached_tokens), sum(reasoning_tokens)"
        f" FROM usage{where} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    with _reading(state_dir) as db:
        return [Totals._make(row) for row in db.execute(sql, values)]


def _where(
    since_s: float | None,
    until_s: float | None,
    token: str | None,
    namespace: str | None,
    model: str | None,
    request_id: str | None,
) -> tuple[str, list[str | int]]:
    terms: dict[str, str | int | None] = {
        "time_ms >= ?": None if since_s is None else int(since_s * 1000),
        "time_ms < ?": None if until_s is None else int(until_s * 1000),
        "token = ?": token,
        "namespace = ?": namespace,
        "model = ?": model,
        "request_id = ?": request_id,
    }
    used = {term: value for term, value in terms.items() if value is not None}
    return (" WHERE " + " AND ".join(used) if used else ""), list(used.values())


def _record(row: tuple[str | int | None, ...]) -> UsageRecord:
    fields = dict(zip(COLUMNS, row, strict=True))
    fields["stream"] = bool(fields["stream"])
    fields["accuracy"] = cast("Accuracy", fields["accuracy"])
    return UsageRecord(**fields)  # type: ignore[arg-type] # the table's columns are the record's


@contextmanager
def _reading(state_dir: Path) -> Iterator[sqlite3.Connection]:
    path = state_dir / DATABASE
    if not path.exists():
        raise LedgerUnreadable(f"{path}: no ledger here")
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=READ_TIMEOUT_S)
        found = schema.version(db)
        if found > schema.VERSION:
            raise LedgerUnreadable(f"{path} has schema {found}; this program knows up to {schema.VERSION}")
        yield db
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise LedgerUnreadable(f"{path} cannot be read ({name})") from error
    finally:
        if db is not None:
            db.close()
