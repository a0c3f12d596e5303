"""The journal's thread may run between any two instructions of the store. Here it does, at every third, and the
process dies right after: a restart may have lost that request's last step, but never charges it twice, and never
leaves a slot taken that nobody holds.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from extproc.journal.writer import Journal
from extproc.limits import saved
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Lease
from tests.limits.ground import Clock, admitted, concurrency, quota, tpd

RULES = (tpd(10_000), quota(10_000), quota(10_000, "response"), concurrency(5))
ASKED, ACTUAL = Amounts(1, 10, 90), Amounts(1, 10, 300)
CODE = {MemoryStore.settle.__code__, MemoryStore._expire.__code__, MemoryStore.reserve.__code__}


def run_with_flush_at(step: int, journal: Journal, action: Callable[[], None]) -> bool:
    """Run `action`, and the journal's flush at its `step`th instruction inside the store. False: it has fewer."""
    seen = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal seen
        if event == "call" and frame.f_code not in CODE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if seen == step:
                sys.settrace(None)
                assert journal._flush()
            seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return seen > step


@pytest.mark.parametrize("end", ["settle", "expire", "reserve"])
def test_flush_between_two_instructions_never_charges_twice(end: str, tmp_path: Path):
    step = 0
    outcomes = set()
    more = True
    while more:
        clock = Clock()
        folder = tmp_path / str(step)
        journal = Journal(folder)
        store = MemoryStore(clock=clock, journal=journal)
        warm = admitted(store.reserve("warm", RULES, ASKED, ttl_s=100))
        lease: Lease | None = None
        if end != "reserve":
            lease = admitted(store.reserve("a", RULES, ASKED, ttl_s=100))
            # Every other time the lease is in the file already when it ends.
            if step % 2:
                assert journal._flush()
        # The counters are marked for the journal already, on another lease's account.
        store.release(warm)

        def action(store=store, lease=lease, clock=clock) -> None:
            if end == "settle":
                store.settle(lease, ACTUAL)
            elif end == "expire":
                clock.now_s += 101
                store.tick()
            else:
                admitted(store.reserve("a", RULES, ASKED, ttl_s=100))

        more = run_with_flush_at(step, journal, action)
        journal.close()
        journal = Journal(folder)
        after = MemoryStore(clock=clock, journal=journal)
        journal.close()
        assert after.reserved(RULES[3].key) == 0
        for known in list(after._books[float("-inf")].values()):
            if known.id == "warm":
                after.release(known)
        for rule, held, actual in ((RULES[0], 100, 310), (RULES[1], 100, 310), (RULES[2], 90, 300)):
            charged = held if end == "expire" else actual
            assert (after.used(rule.key), after.reserved(rule.key)) in {(0, 0), (0, held), (charged, 0)}
            outcomes.add((after.used(rule.key), after.reserved(rule.key)))
        step += 3
    assert step > 50
    assert len(outcomes) > 1


def test_lists_are_taken_without_losing_what_is_appended_meanwhile(tmp_path: Path):
    """Threads for real: many requests against a journal that flushes as often as it can."""
    journal = Journal(tmp_path)
    clock = Clock()
    store = MemoryStore(clock=clock, journal=journal)
    journal.start()
    open_leases = []
    for n in range(5_000):
        open_leases.append(admitted(store.reserve(f"r{n}", (quota(1 << 40),), ASKED, ttl_s=1000)))
        if n % 3:
            store.settle(open_leases.pop(n % 7 % len(open_leases)), ACTUAL)
        if n % 500 == 0:
            assert journal.flush()
    used, reserved = store.used(quota(0).key), store.reserved(quota(0).key)
    assert journal.close()
    journal = Journal(tmp_path)
    after = MemoryStore(clock=clock, journal=journal)
    journal.close()
    assert (after.used(quota(0).key), after.reserved(quota(0).key)) == (used, reserved)
    assert after.open_leases == len(open_leases)


def test_rulesets_of_grants_that_went_do_not_fill_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    most = 100
    monkeypatch.setattr(saved, "_RULESETS_MOST", most)
    clock = Clock()
    journal = Journal(tmp_path)
    store = MemoryStore(clock=clock, journal=journal)
    for n in range(10 * most):
        lease = admitted(store.reserve(f"r{n}", (tpd(10_000, f"tpd/{n}"),), ASKED, ttl_s=100_000))
        assert journal._flush()
        # Every tenth stays open.
        if n % 10:
            store.settle(lease, ACTUAL)
    assert journal._flush()
    (count,) = journal._db.execute("SELECT count(*) FROM rulesets").fetchone()
    assert count <= 2 * most + 10
    journal.close()
    journal = Journal(tmp_path)
    after = MemoryStore(clock=clock, journal=journal)
    journal.close()
    assert after.open_leases == most
    assert [after.reserved(f"tpd/{n}") for n in range(0, 10 * most, 10)] == [100] * most
