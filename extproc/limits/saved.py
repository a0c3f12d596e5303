"""What the journal keeps of a `MemoryStore`: charged sums, and the leases that are open.

A sum's row holds what was charged, a lease's row what it holds; a restart adds them up. For a crash at any moment to
lose usage at worst, and never to charge anything twice, both sides keep an order. The store says that a lease which
the journal took is closed before it charges the counters. The journal reads the counters first, then which leases
closed, then which opened. So a charge that was read always has its lease's end read with it.

Leases that open and close between two flushes are never written at all, and nobody tells that they closed.

A restart gives slots back: the streams that held them ended with the process, and their tokens may go on at once.
"""

import functools
import threading
from typing import TypeAlias

import msgspec

from extproc.journal.errors import StateUnreadable
from extproc.journal.model import Row, Statement
from extproc.journal.writer import Journal
from extproc.limits.counter import Counter
from extproc.limits.meter import CONCURRENT
from extproc.limits.model import Amounts, Context, Lease
from extproc.limits.plan import Plan

_COUNTERS = Statement("INSERT OR REPLACE INTO counters (key, window_s, start_s, used) VALUES", 4)
_OPENED = Statement(
    "INSERT OR REPLACE INTO leases (id, admitted_s, expires_s, requests, prompt, response, ruleset, context) VALUES", 8
)
_RULESETS = Statement("INSERT OR IGNORE INTO rulesets (id, holds) VALUES", 2)
_CLOSED = Statement("DELETE FROM leases WHERE id IN (VALUES", 1, ")")
_UNHELD = "DELETE FROM rulesets WHERE id NOT IN (SELECT ruleset FROM leases)"
_TIDIED = Statement(f"{_UNHELD} AND 1 IN (VALUES", 1, ")")
_RULESETS_MOST = 50_000
"""in the file, before those that no lease holds are dropped: tokens and endpoints come and go"""
_LARGEST = (1 << 63) - 1
_HOLDS = msgspec.msgpack.Decoder(list[tuple[str, int, int]])


Holds: TypeAlias = tuple[Plan, float, dict[str, Lease] | None, float, Context, int]
"""`Lease.holds` while the store still knows the lease; None once it is settled.

(plan, the store's time of admission: a counter whose window began later is not this lease's any more, the book where
the open lease stands or None after it expired, expires_s, context, what it took as one integer for all meters). A
plain tuple: see `Check`.
"""


class SavedLimits:
    """The journal's source for a store. The store appends to the three lists; all else is the journal's thread."""

    def __init__(self, counters: dict[str, Counter]) -> None:
        self.opened: list[Lease] = []
        self.closed: list[str] = []
        self.changed: list[Plan] = []
        self._counters = counters
        self._sums: dict[str, Row] = {}
        self._inserts: dict[str, Row] = {}
        self._deletes: set[str] = set()
        self._written: set[str] = set()
        """ids of the leases that are, or after a failed commit may be, in the file"""
        self._rulesets: dict[int, Row] = {}
        self._known: set[int] = set()
        """ids of the rulesets in the file"""
        self._tidy = False
        """the rulesets that no lease in the file holds are to be dropped, before any is added"""
        self._put_by: list[Lease] = []
        self._taking = threading.Lock()

    def restore(self, journal: Journal, now_s: float) -> list[Lease]:
        """Fill the counters; returns the leases that were open, soonest to expire first. Raises StateUnreadable."""
        for key, window_s, start_s, used in journal.execute("SELECT key, window_s, start_s, used FROM counters"):
            counter = Counter(key, window_s, now_s)
            if counter.start_s == start_s:
                counter.add(used, used)
                counter.saved = (start_s, used)
                self._counters[key] = counter
        leases = []
        # Nobody else knows yet which rulesets are in the file, so this is the time to drop those that nobody holds.
        journal.execute(_UNHELD)
        for row in journal.execute(
            "SELECT leases.id, admitted_s, expires_s, requests, prompt, response, holds, context"
            " FROM leases JOIN rulesets ON rulesets.id = ruleset ORDER BY expires_s"
        ):
            lease_id, at_s, expires_s, requests, prompt, response, blob, context = row
            try:
                held = _HOLDS.decode(blob)
            except msgspec.DecodeError as error:
                raise StateUnreadable(f"{journal.path} is damaged: a lease cannot be read") from error
            amounts = Amounts(requests, prompt, response)
            checks = [
                (self._held(key, window_s, at_s, now_s), 0, unit) for key, window_s, unit in held if unit != CONCURRENT
            ]
            plan = Plan((), checks)
            taken = (requests, prompt, response, prompt + response)
            for counter, unit in plan.holds:
                counter.add(0, taken[unit])
            made = functools.partial(bytes, context)
            leases.append(Lease(lease_id, amounts, (plan, at_s, None, expires_s, made, 0), None, saved=True))
        self._written.update(lease.id for lease in leases)
        return leases

    def _held(self, key: str, window_s: int, at_s: float, now_s: float) -> Counter:
        """Today's counter, or where the lease's window is over, one that nobody else sees."""
        then = Counter(key, window_s, at_s)
        known = self._counters.get(key)
        if known is not None and (known.window_s, known.start_s) == (window_s, then.start_s):
            return known
        if known is None and then.start_s == Counter(key, window_s, now_s).start_s:
            self._counters[key] = then
        return then

    def collect(self) -> None:
        plans = self.changed[:]
        del self.changed[: len(plans)]
        charged: set[Counter] = set()
        for plan in plans:
            # Before the counters are read: a charge that comes later marks the plan again.
            plan.changed = False
            charged.update(plan.charged)
        for counter in charged:
            start_used = start_s, used = counter.read()
            key = counter.key
            if start_used != counter.saved and self._counters.get(key) is counter:
                counter.saved = start_used
                self._sums[key] = (key, counter.window_s, start_s, min(_LARGEST, used))
        with self._taking:
            closed = self.closed[:]
            del self.closed[: len(closed)]
            opened = self.opened[:]
            del self.opened[: len(opened)]
            opened, self._put_by = self._put_by + opened, []
        if len(self._known) >= _RULESETS_MOST and not self._inserts:
            # Every lease that is still to be written brings its ruleset along from here on.
            self._known.clear()
            self._tidy = True
        for lease_id in closed:
            self._inserts.pop(lease_id, None)
            if lease_id in self._written:
                self._deletes.add(lease_id)
        # Most leases are over by now.
        for lease in [lease for lease in opened if lease.holds is not None]:
            # In this order: `settle` takes the holds away before it looks whether it must tell.
            lease.saved = True
            holds: Holds | None = lease.holds
            if holds is not None:
                plan, at_s, book, expires_s, context, _ = holds
                if book is not None:
                    self._inserts[lease.id] = (lease.id, at_s, expires_s, *lease.amounts, plan.ruleset, context())
                    if plan.ruleset not in self._known:
                        self._rulesets[plan.ruleset] = (plan.ruleset, plan.blob)

    def writes(self) -> list[tuple[Statement, list[Row]]]:
        self._written.update(self._inserts)
        deletes: list[Row] = [(lease_id,) for lease_id in self._deletes]
        writes: list[tuple[Statement, list[Row]]] = [
            (_TIDIED, [(1,)] if self._tidy else []),
            (_COUNTERS, list(self._sums.values())),
            (_RULESETS, list(self._rulesets.values())),
            (_CLOSED, deletes),
            (_OPENED, list(self._inserts.values())),
        ]
        return [(statement, rows) for statement, rows in writes if rows]

    def wrote(self) -> None:
        self._written.difference_update(self._deletes)
        self._known.update(self._rulesets)
        self._rulesets.clear()
        self._tidy = False
        self._sums.clear()
        self._deletes.clear()
        self._inserts.clear()

    def depth(self) -> int:
        queued = len(self.opened) + len(self.closed) + len(self.changed) + len(self._put_by)
        return queued + len(self._sums) + len(self._inserts) + len(self._deletes)

    def shed(self, excess: int) -> int:
        """Nothing here may be given up; but while the writer hangs, leases that closed meanwhile need no row."""
        with self._taking:
            opened = self.opened[:]
            del self.opened[: len(opened)]
            self._put_by += [lease for lease in opened if lease.holds is not None]
        return 0
