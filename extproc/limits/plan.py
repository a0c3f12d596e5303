"""A plan: a tuple of rules with its counters already found, and gathered into as few meters as can be.

The same tokens send the same rules again and again, so the store compiles each tuple of rules once. What is left per
request is a walk over one meter for the rates and one for the quota.
"""

import hashlib
import struct
from typing import TypeAlias

import msgspec

from extproc.limits.counter import Counter
from extproc.limits.meter import (
    ALL_BYTES,
    CONCURRENT,
    DAY_S,
    FIELD_BYTES,
    NEVER,
    REQUESTS,
    SIGN,
    SLACK,
    Fields,
    Held,
    Meter,
)
from extproc.limits.model import Rule
from extproc.limits.reading import Reading

Asked: TypeAlias = tuple[int, int, int, int, int]
"""what a request takes, by position of the unit"""
Check: TypeAlias = tuple[Counter, int, int]
"""(counter, limit, unit). A plain tuple: the interpreter unpacks those several times faster than named ones."""
APART_S = 1.0
"""Two rule sets that share some counters but not all would pull them to and fro: a counter stays alone that long."""
_LARGEST = (1 << 63) - 1


class Plan:
    """`checks` has every rule in the caller's order. The others have each counter once, with the lowest of its limits
    where rules share it. Until `bind`, all leases of a plan are settled counter by counter.
    """

    __slots__ = (
        *("_ruleset", "changed", "charged", "checks", "concurrent", "end_s", "guard", "holds", "meters", "reading"),
        *("requests", "rules", "taking", "tokens"),
    )

    def __init__(self, rules: tuple[Rule, ...], checks: list[Check]) -> None:
        self.rules = rules
        """kept, so that no other tuple can come to the same address while this plan is known by it"""
        lowest: dict[Counter, Check] = {}
        for counter, limit, unit in checks:
            # A counter counts one thing: where rules that share it disagree on their unit, the first one's stands.
            _, known_limit, known_unit = lowest.get(counter, (counter, limit, unit))
            lowest[counter] = (counter, min(limit, known_limit), known_unit)
        self.checks = tuple((counter, limit, lowest[counter][2]) for counter, limit, _ in checks)
        self.requests = tuple(check for check in lowest.values() if check[2] == REQUESTS)
        self.tokens = tuple(check for check in lowest.values() if REQUESTS < check[2] < CONCURRENT)
        self.concurrent = tuple(check for check in lowest.values() if check[2] == CONCURRENT)
        self.taking = (*self.requests, *self.tokens, *self.concurrent)
        self.holds: tuple[Held, ...] = tuple((counter, unit) for counter, _, unit in self.taking)
        self.charged = tuple(counter for counter, unit in self.holds if unit != CONCURRENT)
        self.changed = False
        """some counter was charged, and the journal has not looked since"""
        self.meters: tuple[tuple[Meter, int], ...] = ((Meter(self.holds), 0),)
        """with what to add to `taken`, for a field's highest bit to show that the limit is passed"""
        self.guard = 0
        """these highest bits"""
        self.end_s = NEVER
        """when the first of its windows ends"""
        self.reading = Reading()
        self._ruleset: tuple[int, bytes] | None = None

    def bind(self, fields: Fields, now_s: float) -> None:
        """Gather the counters into meters; again after another plan took some of them away."""
        shifts = {check: fields.shift(check[2], check[0].window_s) for check in self.taking}
        known = fields.shifts
        owned: list[tuple[Meter, list[Check]]] = []
        for group in self._groups(now_s):
            wanted = tuple((counter, unit) for counter, _, unit in group)
            meter = group[0][0].place[0]
            if meter.counters != wanted or any(check[0].place[1] != shifts[check] for check in group):
                meter = Meter(wanted)
                meter.gather([shifts[check] for check in group], now_s)
            owned.append((meter, group))
        meters = []
        # A new one: leases keep the one that they were admitted under.
        self.reading = reading = Reading()
        self.guard = 0
        for meter, group in owned:
            at = {shifts[check]: check for check in group}
            full = 0
            layout = "<"
            for shift in known:
                check = at.get(shift)
                full += (SLACK if check is None else SIGN - 1 - min(check[1], _LARGEST)) << shift
                # The low 8 of a field's 12 bytes: no limit is larger.
                layout += f"{FIELD_BYTES}x" if check is None else "q4x"
            self.guard |= sum(SIGN << shift for shift in at)
            meters.append((meter, full))
            if group[0][2] != CONCURRENT:
                for shift in sorted(at):
                    counter, limit, unit = at[shift]
                    limits = reading.requests if unit == REQUESTS else reading.tokens
                    limits.append((limit, counter.window_s))
                rest = ALL_BYTES - FIELD_BYTES * len(known)
                reading.meters.append(struct.Struct(f"{layout}{rest}x").unpack)
        self.meters = tuple(meters)
        self.end_s = min((counter.end_s for counter, _ in self.holds), default=NEVER)

    def _groups(self, now_s: float) -> list[list[Check]]:
        """Rates belong to one token and endpoint, quotas to many: two meters, and one for each other counter."""
        before: list[list[Check]] = []
        rates: dict[tuple[int, int], Check] = {}
        quotas: dict[tuple[int, int], Check] = {}
        after: list[list[Check]] = []
        for check in self.taking:
            counter, _, unit = check
            kind = (unit, counter.window_s)
            group = rates if counter.window_s else quotas
            odd = unit == REQUESTS and counter.window_s not in {60, DAY_S}
            if unit == CONCURRENT or kind in group or odd:
                (before if unit == REQUESTS else after).append([check])
            else:
                group[kind] = check
        middle = []
        for group in (rates, quotas):
            # In the order of their fields' making, which is the same for all plans.
            checks = [group[kind] for kind in sorted(group)]
            wanted = tuple((counter, unit) for counter, _, unit in checks)
            if checks and wanted != checks[0][0].place[0].counters:
                for check in [check for check in checks if 0 <= now_s - check[0].moved_s < APART_S]:
                    (before if check[2] == REQUESTS else after).insert(0, [check])
                    checks.remove(check)
            if checks:
                middle.append(checks)
        return [*before, *middle, *after]

    def turn(self, now_s: float) -> None:
        """Begin the windows that have come."""
        for counter, _ in self.holds:
            if now_s >= counter.end_s:
                counter.roll(now_s)
        self.end_s = min((counter.end_s for counter, _ in self.holds), default=NEVER)

    @property
    def ruleset(self) -> int:
        """Names `blob` by its content, as a 64-bit integer."""
        return self._named()[0]

    @property
    def blob(self) -> bytes:
        """What a restart needs to find the counters again: [key, window_s, unit] of each."""
        return self._named()[1]

    def _named(self) -> tuple[int, bytes]:
        if self._ruleset is None:
            blob = msgspec.msgpack.encode([(counter.key, counter.window_s, unit) for counter, unit in self.holds])
            digest = hashlib.blake2b(blob, digest_size=8).digest()
            self._ruleset = int.from_bytes(digest, "big", signed=True), blob
        return self._ruleset
