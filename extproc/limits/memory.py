"""The embedded limit store: counters in memory, on the event loop's thread, without a lock or an await.

A lease takes its amounts from every counter of its rules at once, or from none. It ends once: settled (the truth is
charged, also above what was reserved), released (nothing is charged), or expired (the reservation is charged, and an
estimated usage row is left). A settle after expiry corrects the charge, once. A lease whose window is over no longer
touches its counter: the new window owes it nothing.

Time never runs backwards here. Where the clock is set back by less than a minute, the store waits for it to catch up;
further back, windows that have not begun are forgotten.

Pass the same tuple object of rules for the same grant: it is compiled once, and then found by its identity.
"""

import time
from collections.abc import Callable, Iterator

import msgspec
import structlog

from extproc.journal.writer import Journal
from extproc.ledger.model import Ledger
from extproc.limits.context import expired_record
from extproc.limits.counter import Counter
from extproc.limits.meter import CONCURRENT, NEVER, UNITS, Fields, Meter
from extproc.limits.model import Amounts, Context, Lease, Refusal, Rule, StoreUnavailable
from extproc.limits.plan import Asked, Plan
from extproc.limits.refusal import refusal
from extproc.limits.saved import Holds, SavedLimits
from extproc.limits.views import CounterView, StoreStats

MAX_AMOUNT = (1 << 53) - 1
MAX_PLANS = 16_384
MAX_BOOKS = 64
EXPIRE_AT_ONCE = 200
DROP_AT_ONCE = 2_000
TICK_S = 1.0
CLEAN_S = 60.0
CLOCK_SLACK_S = 60.0
_NOTHING = Amounts(0, 0, 0)


class MemoryStore:
    """Implements `LimitStore`. With a journal it continues where the last process stopped. Raises StateUnreadable."""

    def __init__(
        self, *, clock: Callable[[], float] = time.time, journal: Journal | None = None, ledger: Ledger | None = None
    ) -> None:
        self.stats = StoreStats()
        self._clock = clock
        self._journal = journal
        self._ledger = ledger
        self._counters: dict[str, Counter] = {}
        self._plans: dict[int, Plan] = {}
        self._fields = Fields()
        self._books: dict[float, dict[str, Lease]] = {}
        """open leases by their time to live: within one book the order of admission is the order of expiry"""
        self._now_s = clock()
        self._tick_at_s = self._now_s
        self._clean_at_s = self._now_s + CLEAN_S
        self._cleaning: list[Counter] = []
        self._waste: list[dict[int, Plan]] = []
        self._log = structlog.get_logger("limits")
        self._saved = SavedLimits(self._counters)
        if journal is not None:
            book = self._books[-NEVER] = {}
            for lease in self._saved.restore(journal, self._now_s):
                plan, at_s, _, expires_s, context, asked = lease.holds
                lease.holds = (plan, at_s, book, expires_s, context, asked)
                book[lease.id] = lease
            journal.attach(self._saved)

    # -- the hot path

    def reserve(
        self, lease_id: str, rules: tuple[Rule, ...], amounts: Amounts, *, ttl_s: float, context: Context = bytes
    ) -> Lease | Refusal:
        """All rules or none. Raises StoreUnavailable; ValueError for an id that is open or an amount out of range."""
        now = self._clock()
        if now < self._now_s:
            now = self._set_back(now)
        self._now_s = now
        if now >= self._tick_at_s:
            self._tick(now)
        journal = self._journal
        if journal is not None and journal.refusing:
            raise StoreUnavailable(f"usage cannot be saved ({journal.status.reason or 'backlog'})")
        requests, prompt, response = amounts
        if (requests | prompt | response) >> 53:
            raise ValueError(f"amount out of range: {amounts}")
        plan = self._plans.get(id(rules))
        if plan is None or plan.rules is not rules:
            plan = self._compile(rules, now)
        book = self._books.get(ttl_s)
        if book is None:
            book, ttl_s = self._book(ttl_s)
        if lease_id in book:
            raise ValueError("this lease is open")
        fields = self._fields
        asked = fields.slot + requests * fields.request + prompt * fields.prompt + response * fields.response
        if now >= plan.end_s:
            plan.turn(now)
        guard = plan.guard
        loads = []
        for meter, full in plan.meters:
            meter.taken = taken = meter.taken + asked
            load = taken + full
            if load & guard:
                # Put back what was taken up to here: nobody else ran in between.
                for begun, _ in plan.meters:
                    begun.taken -= asked
                    if begun is meter:
                        break
                closer = self._look_closer(plan, amounts, asked, now)
                if isinstance(closer, Refusal):
                    return closer
                loads = closer
                break
            loads.append(load)
        lease = Lease(lease_id, amounts, (plan, now, book, now + ttl_s, context, asked), (plan.reading, loads, now))
        book[lease_id] = lease
        if journal is not None:
            self._saved.opened.append(lease)
            if journal.idle:
                journal.wake()
        return lease

    def settle(self, lease: Lease, actual: Amounts) -> None:
        """Charge what was used and return the rest. A second call for the same lease does nothing."""
        holds: Holds | None = lease.holds
        if holds is None:
            return
        lease.holds = None
        requests, prompt, response = actual
        if (requests | prompt | response) >> 53:
            # An engine's word, not ours: an absurd count must neither break a counter nor leave the lease open.
            requests, prompt, response = (min(max(n, 0), MAX_AMOUNT) for n in actual)
        _, held_prompt, held_response = lease.amounts
        if prompt > held_prompt or response > held_response:
            self.stats.overspent += 1
        plan, at_s, book, _, _, asked = holds
        fields = self._fields
        charge = requests * fields.request + prompt * fields.prompt + response * fields.response
        change = charge - asked
        if book is None:
            # Expired: the counters were charged what was held, and the concurrent slot is free already.
            self.stats.corrected += 1
            charge = change = change + fields.slot
        else:
            book.pop(lease.id, None)
        # The order is what `SavedLimits` relies on: closed, then charged, then marked.
        if lease.saved:
            self._saved.closed.append(lease.id)
        for meter, _ in plan.meters:
            if meter.start_s <= at_s:
                meter.used += charge
                meter.taken += change
            else:
                self._settle_each(meter, lease, Amounts(requests, prompt, response), at_s, expired=book is None)
        journal = self._journal
        if journal is not None:
            if not plan.changed:
                plan.changed = True
                self._saved.changed.append(plan)
            if journal.idle:
                journal.wake()

    def release(self, lease: Lease) -> None:
        """Return everything: the request reached no engine, or the engine failed it. Idempotent like `settle`."""
        self.settle(lease, _NOTHING)

    # -- once a second

    def tick(self) -> None:
        """Expire leases and drop idle counters, a bounded piece of each. The loop calls it while no request does."""
        now = self._clock()
        if now < self._now_s:
            now = self._set_back(now)
        self._now_s = now
        self._tick(now)

    def _tick(self, now: float) -> None:
        self._tick_at_s = now + TICK_S
        if self._journal is not None:
            self._journal.check()
        room = EXPIRE_AT_ONCE
        for ttl_s, book in list(self._books.items()):
            due: list[Lease] = []
            for lease in book.values():
                if lease.holds[3] > now or len(due) == room:
                    break
                due.append(lease)
            for lease in due:
                self._expire(lease, now)
            room -= len(due)
            if not book:
                del self._books[ttl_s]
        if not room:
            self._tick_at_s = now
        self._clean(now)

    def _expire(self, lease: Lease, now: float) -> None:
        plan, at_s, book, expires_s, made, asked = lease.holds
        lease.holds = (plan, at_s, None, expires_s, bytes, asked)
        book.pop(lease.id)
        self.stats.expired += 1
        requests, prompt, response = lease.amounts
        charge = (requests, prompt, response, prompt + response, 0)
        self._saved_closed(lease.id)
        for counter, unit in plan.holds:
            if counter.start_s <= at_s:
                counter.add(charge[unit], -1 if unit == CONCURRENT else 0)
        self._saved_changed(plan)
        context = made() if self._ledger is not None else b""
        if self._ledger is not None and context:
            try:
                self._ledger.append(expired_record(context, lease.amounts, now))
            except msgspec.MsgspecError:
                self._log.error("lease_context_unreadable", lease=lease.id)

    def _clean(self, now: float) -> None:
        """Drop counters that say nothing: windows that ended, slots that are all free. They come back when asked for.

        A quota stays, also at 0: a lease that reserved nothing of it may still be settled with more.
        """
        self._drop_waste(DROP_AT_ONCE)
        if not self._cleaning:
            if now < self._clean_at_s:
                return
            self._clean_at_s = now + CLEAN_S
            self._cleaning = list(self._counters.values())
        dropped = False
        for counter in self._cleaning[-DROP_AT_ONCE:]:
            idle = now >= counter.end_s or (counter.concurrent and not counter.taken)
            if idle and self._counters.get(counter.key) is counter:
                del self._counters[counter.key]
                dropped = True
        del self._cleaning[-DROP_AT_ONCE:]
        if dropped:
            self._forget_plans()

    # -- for metrics and an admin

    @property
    def open_leases(self) -> int:
        return sum(map(len, self._books.values()))

    def used(self, key: str) -> int:
        """Charged in the current window; 0 for a counter that nobody used."""
        counter = self._counters.get(key)
        return 0 if counter is None or max(self._clock(), self._now_s) >= counter.end_s else counter.used

    def reserved(self, key: str) -> int:
        """Held by open leases in the current window."""
        counter = self._counters.get(key)
        return (
            0 if counter is None or max(self._clock(), self._now_s) >= counter.end_s else counter.taken - counter.used
        )

    def counters(self) -> Iterator[CounterView]:
        """A snapshot: every counter whose window has not ended."""
        now = max(self._clock(), self._now_s)
        for counter in list(self._counters.values()):
            if now < counter.end_s:
                reserved = counter.taken - counter.used
                yield CounterView(counter.key, counter.window_s, counter.start_s, counter.used, reserved)

    def set_used(self, key: str, used: int, *, window_s: int = 0) -> None:
        """Set what was charged, as 0 to reset a quota; open leases keep what they hold. `window_s` of a new counter."""
        if not 0 <= used <= MAX_AMOUNT:
            raise ValueError(f"used out of range: {used}")
        self.tick()
        known = self._counters.get(key)
        counter = known or self._counter(key, window_s)
        if self._now_s >= counter.end_s:
            counter.roll(self._now_s)
        change = used - counter.used
        counter.add(change, change)
        self._saved_changed(Plan((), [(counter, 0, UNITS["total"])]))

    # -- seldom

    def _look_closer(self, plan: Plan, amounts: Amounts, asked: int, now: float) -> list[int] | Refusal:
        """Some meter reads as full: it is, or the request takes nothing of what is full, or the meter is dead."""
        if any(meter.dead for meter, _ in plan.meters):
            plan.bind(self._fields, now)
        requests, prompt, response = amounts
        takes: Asked = (requests, prompt, response, prompt + response, 1)
        refused = refusal(plan, takes, now)
        if refused is not None:
            return refused
        loads = []
        for meter, full in plan.meters:
            meter.taken += asked
            loads.append(meter.taken + full)
        return loads

    @staticmethod
    def _settle_each(meter: Meter, lease: Lease, actual: Amounts, at_s: float, *, expired: bool) -> None:
        """`settle` for a meter some of whose windows are over, or that is dead."""
        requests, prompt, response = actual
        held_requests, held_prompt, held_response = lease.amounts
        charge = (requests, prompt, response, prompt + response, 0)
        held = (held_requests, held_prompt, held_response, held_prompt + held_response, 0 if expired else 1)
        for counter, unit in meter.counters:
            if counter.start_s <= at_s:
                change = charge[unit] - held[unit]
                counter.add(change if expired else charge[unit], change)

    def _compile(self, rules: tuple[Rule, ...], now: float) -> Plan:
        checks = []
        for rule in rules:
            window_s = 0 if rule.unit == "concurrent" else rule.window_s
            counter = self._counter(rule.key, window_s)
            counter.concurrent = rule.unit == "concurrent"
            checks.append((counter, rule.limit, UNITS[rule.unit]))
        if len(self._plans) >= MAX_PLANS:
            self._forget_plans()
        # Where more grants are in use than plans are kept, thousands are made and forgotten every second.
        self._drop_waste(2)
        plan = self._plans[id(rules)] = Plan(rules, checks)
        plan.bind(self._fields, now)
        return plan

    def _counter(self, key: str, window_s: int) -> Counter:
        counter = self._counters.get(key)
        if counter is not None and counter.window_s == window_s:
            return counter
        if counter is not None:
            # Plans that know the key with its former window would go on with the old counter.
            self._forget_plans()
        counter = self._counters[key] = Counter(key, window_s, self._now_s)
        return counter

    def _book(self, ttl_s: float) -> tuple[dict[str, Lease], float]:
        """The book for a time to live. Callers use a few; where they use many, powers of two stand in for them."""
        if not ttl_s > 0 or ttl_s == NEVER:
            raise ValueError(f"ttl_s out of range: {ttl_s}")
        if len(self._books) >= MAX_BOOKS:
            ttl_s = float(1 << max(0, int(ttl_s)).bit_length())
        return self._books.setdefault(ttl_s, {}), ttl_s

    def _set_back(self, now: float) -> float:
        """The clock shows less than before. Returns the time to go on with."""
        if self._now_s - now <= CLOCK_SLACK_S:
            return self._now_s
        self._log.warning("clock_set_back", seconds=round(self._now_s - now))
        for counter in list(self._counters.values()):
            if counter.start_s > now:
                del self._counters[counter.key]
        self._forget_plans()
        self._cleaning.clear()
        self._tick_at_s = now
        self._clean_at_s = now + CLEAN_S
        return now

    def _forget_plans(self) -> None:
        """Freeing many thousand of them takes milliseconds, so `_drop_waste` does it bit by bit."""
        self._waste.append(self._plans)
        self._plans = {}

    def _drop_waste(self, plans: int) -> None:
        for _ in range(plans):
            while self._waste and not self._waste[-1]:
                self._waste.pop()
            if not self._waste:
                break
            self._waste[-1].popitem()

    def _saved_closed(self, lease_id: str) -> None:
        if self._journal is not None:
            self._saved.closed.append(lease_id)

    def _saved_changed(self, plan: Plan) -> None:
        if self._journal is not None:
            if not plan.changed:
                plan.changed = True
                self._saved.changed.append(plan)
            self._journal.wake()
