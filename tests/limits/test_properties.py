"""The store against a naive model that keeps every lease and adds everything up again for each question."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from extproc.journal.writer import Journal
from extproc.limits.memory import CLOCK_SLACK_S, MemoryStore
from extproc.limits.model import Amounts, Lease, Refusal, Rule
from tests.limits.ground import NOON, Clock

SHAPES = [
    Rule("t1/rpm", "rpm", "requests", 0, 60),
    Rule("t2/rpm", "rpm", "requests", 0, 60),
    Rule("t1/rpd", "rpd", "requests", 0, 86_400),
    Rule("t1/tpm", "tpm", "total", 0, 60),
    Rule("t2/tpm", "tpm", "total", 0, 60),
    Rule("t1/tpd", "tpd", "total", 0, 86_400),
    Rule("q/prompt", "prompt", "prompt", 0, 0),
    Rule("q/response", "response", "response", 0, 0),
    Rule("q/total", "total", "total", 0, 0),
    Rule("t1/slots", "concurrency", "concurrent", 0, 0),
]
small = st.integers(0, 60)
amounts = st.builds(Amounts, st.integers(0, 2), small, small)
limits = st.integers(0, 200) | st.integers(300, 2000)
rule_sets = st.lists(st.tuples(st.sampled_from(SHAPES), limits), max_size=6, unique_by=lambda pair: pair[0])


def takes(rule: Rule, asked: Amounts) -> int:
    sums = {"requests": asked.requests, "prompt": asked.prompt, "response": asked.response, "concurrent": 1}
    return sums.get(rule.unit, asked.prompt + asked.response)


@dataclass
class Known:
    """A lease as the model sees it."""

    rules: tuple[Rule, ...]
    asked: Amounts
    at_s: float
    expires_s: float
    lease: Lease | None
    charged: Amounts | None = None
    """None while it is open"""
    ended: bool = False


class Limits(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock(NOON - 30)
        self.now_s = self.clock.now_s
        self.leases: list[Known] = []
        self.sets = [tuple(Rule(r.key, r.kind, r.unit, 1000, r.window_s) for r in SHAPES)]
        self.count = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(Path(self.folder.name))
        self.store = MemoryStore(clock=self.clock, journal=self.journal)

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    def sums(self, rule: Rule) -> tuple[int, int]:
        """(charged, reserved) in the window that is now."""

        def window(time_s: float) -> float:
            return time_s // rule.window_s if rule.window_s else 0

        used = reserved = 0
        for known in self.leases:
            if rule.key in {r.key for r in known.rules} and window(known.at_s) == window(self.now_s):
                if known.charged is None:
                    slot_of_before = rule.unit == "concurrent" and known.lease is None
                    reserved += 0 if slot_of_before else takes(rule, known.asked)
                elif rule.unit != "concurrent":
                    used += takes(rule, known.charged)
        return used, reserved

    @rule(shapes=rule_sets, asked=amounts, ttl_s=st.sampled_from([5, 50, 500]))
    def reserve_new(self, shapes: list[tuple[Rule, int]], asked: Amounts, ttl_s: float) -> None:
        rules = tuple(Rule(r.key, r.kind, r.unit, limit, r.window_s) for r, limit in shapes)
        self.sets.append(rules)
        self.reserve(rules, asked, ttl_s)

    @rule(data=st.data(), asked=amounts, ttl_s=st.sampled_from([5, 50, 500]))
    def reserve_again(self, data: st.DataObject, asked: Amounts, ttl_s: float) -> None:
        self.reserve(data.draw(st.sampled_from(self.sets)), asked, ttl_s)

    def reserve(self, rules: tuple[Rule, ...], asked: Amounts, ttl_s: float) -> None:
        self.count += 1
        outcome = self.store.reserve(f"r{self.count}", rules, asked, ttl_s=ttl_s)
        broken = [r for r in rules if takes(r, asked) and sum(self.sums(r)) + takes(r, asked) > r.limit]
        if broken:
            assert isinstance(outcome, Refusal)
            assert outcome.rule == broken[0]
            assert outcome.used == sum(self.sums(broken[0]))
        else:
            assert isinstance(outcome, Lease)
            self.leases.append(Known(rules, asked, self.now_s, self.now_s + ttl_s, outcome))
        for standing, units in ((outcome.requests, {"requests"}), (outcome.tokens, {"prompt", "response", "total"})):
            left = [max(0, r.limit - sum(self.sums(r))) for r in rules if r.unit in units]
            assert (standing.remaining if standing else None) == (min(left) if left else None)

    @precondition(lambda self: any(known.lease for known in self.leases))
    @rule(data=st.data(), actual=amounts, give_back=st.booleans())
    def end(self, data: st.DataObject, actual: Amounts, give_back: bool) -> None:
        """Open, settled and expired ones alike."""
        known = data.draw(st.sampled_from([known for known in self.leases if known.lease]))
        assert known.lease is not None
        self.store.release(known.lease) if give_back else self.store.settle(known.lease, actual)
        if not known.ended:
            known.charged = Amounts(0, 0, 0) if give_back else actual
            known.ended = True

    @rule(seconds=st.sampled_from([0.5, 3, 61, 700, -20]))
    def wait(self, seconds: float) -> None:
        # Set back by more than the store waits for, it forgets windows: test_memory has that.
        self.clock.now_s = max(self.clock.now_s + seconds, self.now_s - CLOCK_SLACK_S)
        self.now_s = max(self.now_s, self.clock.now_s)
        self.store.tick()
        for known in self.leases:
            if known.charged is None and known.expires_s <= self.now_s:
                known.charged = known.asked

    @rule()
    def next_day(self) -> None:
        self.wait(86_400)

    @rule()
    def restart(self) -> None:
        """Die right after a flush. Whoever held a lease is gone, and its slot; what it takes of the sums is not."""
        self.clock.now_s = max(self.now_s, self.clock.now_s)
        assert self.journal._flush()
        self.journal.close()
        self.open()
        for known in self.leases:
            known.lease = None
        self.wait(0)

    @rule()
    def flush(self) -> None:
        assert self.journal._flush()

    @invariant()
    def sums_agree(self) -> None:
        for shape in SHAPES:
            assert (self.store.used(shape.key), self.store.reserved(shape.key)) == self.sums(shape), shape.key


Limits.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLimits = Limits.TestCase
