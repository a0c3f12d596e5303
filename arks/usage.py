"""`arks usage`: the ledger's rows, as a table for people or JSON lines for programs."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import msgspec

from arks.errors import ArksError
from extproc.ledger.model import UsageRecord
from extproc.ledger.query import LedgerUnreadable, query

HEADINGS = (
    "TIME",
    "TOKEN",
    "NAMESPACE",
    "MODEL",
    "ENDPOINT",
    "ENGINE",
    "STATUS",
    "PROMPT",
    "COMPLETION",
    "CACHED",
    "REASONING",
    "COUNT",
    "STREAM",
    "MS",
    "TTFT",
    "REQUEST ID",
)
NUMBERS = frozenset({"STATUS", "PROMPT", "COMPLETION", "CACHED", "REASONING", "MS", "TTFT"})


@dataclass(frozen=True, slots=True)
class UsageSettings:
    state: Path
    as_json: bool
    since_s: float | None
    """Unix seconds"""
    token: str | None
    namespace: str | None
    model: str | None
    limit: int


def run(settings: UsageSettings, out: TextIO | None = None) -> int:
    """Print the latest rows, oldest first. Raises ArksError where the ledger cannot be read."""
    try:
        records = query(
            settings.state,
            since_s=settings.since_s,
            token=settings.token,
            namespace=settings.namespace,
            model=settings.model,
            limit=settings.limit,
        )
    except LedgerUnreadable as error:
        raise ArksError(f"--state {settings.state}: {error}") from error
    to = out or sys.stdout
    if settings.as_json:
        to.writelines(_json(record) + "\n" for record in records)
    else:
        to.writelines(line + "\n" for line in _table(records))
    return 0


def _json(record: UsageRecord) -> str:
    return msgspec.json.encode({**msgspec.structs.asdict(record), "time": _time(record)}).decode()


def _time(record: UsageRecord) -> str:
    return datetime.fromtimestamp(record.time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _table(records: Iterable[UsageRecord]) -> Iterable[str]:
    rows = [_row(record) for record in records]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    for row in (HEADINGS, *rows):
        cells = (
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _row(record: UsageRecord) -> tuple[str, ...]:
    values = (
        _time(record),
        record.token,
        record.namespace,
        record.model,
        record.endpoint,
        record.engine or "-",
        record.status,
        record.prompt_tokens,
        record.completion_tokens,
        record.cached_tokens,
        record.reasoning_tokens,
        record.accuracy,
        "yes" if record.stream else "no",
        record.duration_ms,
        "-" if record.ttft_ms is None else record.ttft_ms,
        record.request_id,
    )
    # Model and request id are clients' text: no control characters onto a terminal.
    return tuple("".join(char if char.isprintable() else "?" for char in str(value)) for value in values)
