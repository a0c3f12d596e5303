"""What the journal is told, and what it asks of those who have something to save.

The event loop never calls into SQLite: a source's own methods append to plain lists, and the writer thread takes from
them through `collect`. List slices and slice deletions are single steps of the interpreter, so neither side locks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

OnFailure: TypeAlias = Literal["refuse", "serve"]
"""while nothing can be saved: admit no request, or go on and drop the oldest ledger rows beyond the bound"""


@dataclass(frozen=True, slots=True)
class JournalSettings:
    on_failure: OnFailure = "refuse"
    grace_s: float = 1.0
    """how long writing may fail before `refuse` refuses"""
    max_queued: int = 100_000
    """entries waiting in memory, of all kinds"""
    retain_days: int | None = None
    """usage rows older than this are deleted; None keeps them"""
    flush_interval_s: float = 0.04
    """from the first unsaved entry to its transaction; with the transaction's own time this stays below 100 ms"""


@dataclass(frozen=True, slots=True)
class JournalStatus:
    ok: bool
    since_s: float
    """Unix time of the last change between ok and failing"""
    reason: str
    """of the last failure, kept after recovery; SQLite's name for it, never content"""
    refusing: bool
    """`reserve` raises StoreUnavailable now"""
    queued: int
    """entries not yet durable"""
    dropped: int
    """ledger rows given up beyond the bound (`serve` only)"""
    rejected: int
    """rows that SQLite can never take, such as text that is not Unicode"""
    written: int
    """rows written since the start"""


class Statement(NamedTuple):
    """One kind of idempotent row write: `head` VALUES (…),(…) `tail`, or for a delete `head` IN (VALUES (?),(?))."""

    head: str
    columns: int
    tail: str = ""


Row: TypeAlias = Sequence[Any]


class Source(Protocol):
    """Owner of some tables' rows. All but `depth` and `shed` are called on the writer thread."""

    def collect(self) -> None:
        """Take what changed since the last call and merge it with what could not be written yet."""

    def writes(self) -> list[tuple[Statement, list[Row]]]:
        """Everything collected and not yet durable, in the order to write it."""

    def wrote(self) -> None:
        """What `writes` returned is durable."""

    def depth(self) -> int:
        """Entries not yet durable."""

    def shed(self, excess: int) -> int:
        """Give up the `excess` oldest entries that may be given up. Returns how many were dropped. Any thread."""
