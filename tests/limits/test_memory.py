import asyncio
import gc

import pytest

from extproc.ledger.model import LEASE_EXPIRED, UsageRecord
from extproc.limits import memory
from extproc.limits.context import decode_context, encode_context
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Lease, Rule, Standing
from extproc.limits.plan import Plan
from tests.limits.ground import (
    NOON,
    ONE,
    Clock,
    admitted,
    concurrency,
    quota,
    record,
    refused,
    rpd,
    rpm,
    tpd,
    tpm,
)


class Rows:
    def __init__(self) -> None:
        self.rows: list[UsageRecord] = []

    def append(self, record: UsageRecord) -> None:
        self.rows.append(record)


async def test_burst_of_200_at_a_limit_of_40_admits_exactly_40():
    store = MemoryStore(clock=Clock())
    rules = (rpm(40), tpm(10**9))
    go = asyncio.Event()

    async def ask(n: int) -> bool:
        await go.wait()
        return isinstance(store.reserve(f"r{n}", rules, ONE, ttl_s=60), Lease)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(n)) for n in range(200)]
        await asyncio.sleep(0)
        go.set()
    assert sum(task.result() for task in tasks) == 40
    assert (store.used(rules[0].key), store.reserved(rules[0].key)) == (0, 40)


def test_token_limit_is_exact_to_one_token():
    store = MemoryStore(clock=Clock())
    rules = (tpm(250),)
    admitted(store.reserve("a", rules, ONE, ttl_s=60))
    admitted(store.reserve("b", rules, ONE, ttl_s=60))
    refusal = refused(store.reserve("c", rules, Amounts(1, 10, 41), ttl_s=60))
    assert (refusal.used, refusal.asked) == (200, 51)
    admitted(store.reserve("d", rules, Amounts(1, 10, 40), ttl_s=60))
    assert store.reserved(rules[0].key) == 250


def test_refused_request_consumes_nothing_of_any_rule():
    store = MemoryStore(clock=Clock())
    rules = (rpm(5), tpm(1000), quota(500, "prompt"), quota(150), concurrency(9))
    admitted(store.reserve("a", rules, ONE, ttl_s=60))
    before = list(store.counters())
    refusal = refused(store.reserve("b", rules, ONE, ttl_s=60))
    assert refusal.rule == rules[3]
    assert refusal.retry_after_s is None
    assert list(store.counters()) == before
    refused(store.reserve("c", (*rules[:3], concurrency(1)), ONE, ttl_s=60))
    assert list(store.counters()) == before


def test_first_rule_in_order_names_the_refusal_and_when_to_come_back():
    clock = Clock(NOON + 45)
    store = MemoryStore(clock=clock)
    both = (tpm(99), rpm(0))
    refusal = refused(store.reserve("a", both, ONE, ttl_s=60))
    assert (refusal.rule.kind, refusal.retry_after_s) == ("tpm", 15)
    assert refusal.tokens == Standing(99, 99, 15)
    assert refusal.requests == Standing(0, 0, 15)
    day = refused(store.reserve("b", (rpd(0),), ONE, ttl_s=60))
    assert day.retry_after_s == 43_200 - 45
    slots = refused(store.reserve("c", (concurrency(0),), ONE, ttl_s=60))
    assert (slots.retry_after_s, slots.requests, slots.tokens) == (1, None, None)


def test_standing_is_the_tightest_of_its_family_after_the_reservation():
    store = MemoryStore(clock=Clock(NOON + 20))
    rules = (rpm(100), rpd(50), tpm(5000), tpd(90_000), quota(300), concurrency(5))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))
    assert lease.requests == Standing(50, 49, 43_200 - 20)
    assert lease.tokens == Standing(300, 200, 0)
    assert admitted(store.reserve("b", (), ONE, ttl_s=60)).requests is None


def test_standing_stays_as_it_was_at_admission_whatever_other_rules_do_to_its_counters():
    store = MemoryStore(clock=Clock())
    rules = (rpm(10), rpd(20), tpm(1000), quota(5000))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))
    admitted(store.reserve("b", (rpm(50), quota(700)), ONE, ttl_s=60))
    again = admitted(store.reserve("c", rules, ONE, ttl_s=60))
    store.settle(lease, Amounts(1, 1, 1))
    assert lease.standings() == (Standing(10, 9, 60), Standing(1000, 900, 60))
    assert again.standings() == (Standing(10, 7, 60), Standing(1000, 800, 60))
    store.release(again)
    assert [store.used(rule.key) for rule in rules] == [1, 1, 2, 2]
    assert [store.reserved(rule.key) for rule in rules] == [1, 0, 0, 100]


def test_unused_part_returns_at_settle():
    store = MemoryStore(clock=Clock())
    rules = (tpm(100), quota(100, "response"), concurrency(1))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))
    refused(store.reserve("b", rules, Amounts(1, 1, 1), ttl_s=60))
    store.settle(lease, Amounts(1, 10, 20))
    assert [(store.used(rule.key), store.reserved(rule.key)) for rule in rules] == [(30, 0), (20, 0), (0, 0)]
    admitted(store.reserve("c", rules, Amounts(1, 0, 70), ttl_s=60))


def test_settle_above_the_reservation_charges_the_truth_and_is_counted():
    store = MemoryStore(clock=Clock())
    rules = (tpm(100),)
    store.settle(admitted(store.reserve("a", rules, ONE, ttl_s=60)), Amounts(1, 10, 200))
    assert store.used(rules[0].key) == 210
    assert store.stats.overspent == 1
    assert refused(store.reserve("b", rules, Amounts(1, 0, 1), ttl_s=60)).used == 210
    # A request that takes none of an overdrawn counter is not that counter's to refuse.
    admitted(store.reserve("c", rules, Amounts(1, 0, 0), ttl_s=60))


def test_overdrawn_counter_does_not_hide_another_that_is_full():
    store = MemoryStore(clock=Clock())
    response, prompt = quota(10, "response"), quota(50, "prompt")
    store.set_used(response.key, 500)
    store.set_used(prompt.key, 50)
    assert refused(store.reserve("a", (response, prompt), Amounts(1, 1, 0), ttl_s=60)).rule == prompt
    assert store.reserved(response.key) == store.reserved(prompt.key) == 0


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("then", ["settle", "release"])
def test_lease_ends_once(first: str, then: str):
    store = MemoryStore(clock=Clock())
    rules = (rpm(10), tpm(1000), concurrency(3))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))

    def end(how: str) -> None:
        store.settle(lease, Amounts(1, 5, 5)) if how == "settle" else store.release(lease)

    end(first)
    after = list(store.counters())
    end(then)
    assert list(store.counters()) == after
    assert store.open_leases == 0


def test_late_settle_leaves_the_next_window_alone():
    clock = Clock(NOON + 59)
    store = MemoryStore(clock=clock)
    rules = (rpm(1), tpm(100), tpd(1000))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=600))
    clock.now_s = NOON + 61
    other = admitted(store.reserve("b", rules, ONE, ttl_s=600))
    store.settle(lease, Amounts(1, 10, 80))
    assert [(store.used(rule.key), store.reserved(rule.key)) for rule in rules] == [(0, 1), (0, 100), (90, 100)]
    store.release(other)
    assert store.reserved(rules[1].key) == 0


def test_expired_lease_is_charged_as_reserved_and_leaves_an_estimated_row():
    clock, rows = Clock(), Rows()
    store = MemoryStore(clock=clock, ledger=rows)
    rules = (tpd(1000), concurrency(1))
    started = record("a", status=200, prompt_tokens=0, completion_tokens=0, accuracy="exact", duration_ms=0)
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=30, context=lambda: encode_context(started)))
    clock.now_s += 29.9
    store.tick()
    assert store.open_leases == 1
    clock.now_s += 0.2
    store.tick()
    store.tick()
    assert (store.used(rules[0].key), store.reserved(rules[0].key), store.reserved(rules[1].key)) == (100, 0, 0)
    (row,) = rows.rows
    assert (row.id, row.attempt, row.status, row.accuracy, row.error) == ("a", 1, 0, "estimated", LEASE_EXPIRED)
    assert (row.prompt_tokens, row.completion_tokens, row.duration_ms, row.token) == (10, 90, 30_100, "example-token")
    store.settle(lease, Amounts(1, 10, 20))
    store.settle(lease, Amounts(1, 10, 5))
    store.release(lease)
    assert (store.used(rules[0].key), store.reserved(rules[0].key), store.reserved(rules[1].key)) == (30, 0, 0)
    assert (store.stats.expired, store.stats.corrected) == (1, 1)


def test_expiry_is_cut_into_pieces():
    clock = Clock()
    store = MemoryStore(clock=clock)
    rules = (tpd(10**9), concurrency(5000))
    for n in range(1000):
        admitted(store.reserve(f"r{n}", rules, ONE, ttl_s=10 + n % 3))
    clock.now_s += 20
    pieces = []
    while store.open_leases:
        before = store.open_leases
        store.tick()
        pieces.append(before - store.open_leases)
    assert max(pieces) <= 200
    assert (store.used(rules[0].key), store.reserved(rules[1].key)) == (100_000, 0)


def test_many_different_lifetimes_still_expire_each():
    clock = Clock()
    store = MemoryStore(clock=clock)
    for n in range(500):
        admitted(store.reserve(f"r{n}", (concurrency(1000),), ONE, ttl_s=1 + n / 7))
    clock.now_s += 200
    for _ in range(5):
        store.tick()
    assert store.open_leases == 0


def test_changed_limit_keeps_the_counter():
    store = MemoryStore(clock=Clock())
    store.settle(admitted(store.reserve("a", (tpm(100),), ONE, ttl_s=60)), ONE)
    assert refused(store.reserve("b", (tpm(150),), ONE, ttl_s=60)).used == 100
    assert admitted(store.reserve("c", (tpm(200),), ONE, ttl_s=60)).tokens == Standing(200, 0, 60)
    refused(store.reserve("d", (tpm(50),), ONE, ttl_s=60))


def test_rules_that_share_a_key_charge_it_once_and_obey_the_lower_limit():
    store = MemoryStore(clock=Clock())
    shared = (tpm(500), tpm(150))
    lease = admitted(store.reserve("a", shared, ONE, ttl_s=60))
    assert store.reserved(shared[0].key) == 100
    assert lease.tokens == Standing(150, 50, 60)
    assert refused(store.reserve("b", shared, ONE, ttl_s=60)).rule.limit == 150
    store.settle(lease, ONE)
    assert (store.used(shared[0].key), store.reserved(shared[0].key)) == (100, 0)


@pytest.mark.parametrize("amounts", [Amounts(1, -1, 5), Amounts(-1, 1, 5), Amounts(1, 1, 1 << 60)])
def test_absurd_reservation_is_an_error_that_takes_nothing(amounts: Amounts):
    store = MemoryStore(clock=Clock())
    with pytest.raises(ValueError, match="out of range"):
        store.reserve("a", (rpm(5),), amounts, ttl_s=60)
    assert store.reserved(rpm(5).key) == 0


def test_absurd_usage_from_an_engine_neither_breaks_the_counter_nor_leaks_the_lease():
    store = MemoryStore(clock=Clock())
    rules = (tpm(1000), concurrency(1))
    store.settle(admitted(store.reserve("a", rules, ONE, ttl_s=60)), Amounts(1, -7, 20))
    assert (store.used(rules[0].key), store.open_leases) == (20, 0)
    store.settle(admitted(store.reserve("b", rules, ONE, ttl_s=60)), Amounts(1, 1 << 90, 0))
    assert store.used(rules[0].key) == 20 + (1 << 53) - 1


def test_same_id_twice_is_an_error_and_the_first_lease_stays():
    store = MemoryStore(clock=Clock())
    rules = (concurrency(5),)
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))
    with pytest.raises(ValueError, match="open"):
        store.reserve("a", rules, ONE, ttl_s=60)
    store.release(lease)
    assert store.reserved(rules[0].key) == 0
    admitted(store.reserve("a", rules, ONE, ttl_s=60))


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), float("-inf")])
def test_lease_that_could_never_expire_is_an_error(ttl_s: float):
    with pytest.raises(ValueError, match="ttl_s"):
        MemoryStore(clock=Clock()).reserve("a", (), ONE, ttl_s=ttl_s)


def test_idle_counters_are_dropped_and_nothing_open_is_lost():
    clock = Clock()
    store = MemoryStore(clock=clock)
    grants = [(rpm(5, f"rpm/{n}"), tpd(500, f"tpd/{n}"), concurrency(2, f"slots/{n}")) for n in range(3000)]
    open_leases = [admitted(store.reserve(f"r{n}", rules, ONE, ttl_s=10_000)) for n, rules in enumerate(grants)]
    for lease in open_leases[1:]:
        store.settle(lease, ONE)
    assert sum(1 for _ in store.counters()) == 9000
    for _ in range(10):
        clock.now_s += 61
        store.tick()
    assert len(store._counters) == 3001
    assert len(store._plans) == 0
    assert store.reserved("slots/0") == 1
    store.settle(open_leases[0], Amounts(1, 1, 1))
    assert (store.reserved("slots/0"), store.used("tpd/0"), store.used("tpd/7")) == (0, 2, 100)
    refused(store.reserve("again", (tpd(150, "tpd/7"),), ONE, ttl_s=60))


def test_more_grants_in_use_than_are_kept_ready_do_not_pile_up_between_two_seconds(monkeypatch):
    monkeypatch.setattr(memory, "MAX_PLANS", 50)
    store = MemoryStore(clock=Clock())
    grants = [(tpd(10**9, f"tpd/{n}"),) for n in range(75)]
    for n in range(3000):
        store.settle(admitted(store.reserve(f"r{n}", grants[n % 75], ONE, ttl_s=60)), ONE)
    made = sum(isinstance(each, Plan) for each in gc.get_objects())
    assert made <= 2 * 50


def test_clock_set_back_a_little_neither_opens_nor_forgets_a_window():
    clock = Clock(NOON + 70)
    store = MemoryStore(clock=clock)
    rules = (rpm(1),)
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=600))
    clock.now_s = NOON + 30
    refused(store.reserve("b", rules, ONE, ttl_s=600))
    store.release(lease)
    store.settle(admitted(store.reserve("c", rules, ONE, ttl_s=600)), ONE)
    clock.now_s = NOON + 119
    refused(store.reserve("d", rules, ONE, ttl_s=600))
    clock.now_s = NOON + 120
    admitted(store.reserve("e", rules, ONE, ttl_s=600))


def test_clock_that_was_far_ahead_does_not_freeze_windows():
    clock = Clock(NOON + 10 * 86_400)
    store = MemoryStore(clock=clock)
    rules = (rpm(1), quota(1000))
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=600))
    clock.now_s = NOON
    other = admitted(store.reserve("b", rules, ONE, ttl_s=600))
    store.settle(lease, ONE)
    assert (store.used(rules[0].key), store.reserved(rules[0].key)) == (0, 1)
    assert (store.used(rules[1].key), store.reserved(rules[1].key)) == (100, 100)
    store.settle(other, ONE)
    clock.now_s += 60
    admitted(store.reserve("c", rules, ONE, ttl_s=600))


def test_set_used_keeps_what_open_leases_hold():
    store = MemoryStore(clock=Clock())
    rules = (quota(1000),)
    lease = admitted(store.reserve("a", rules, ONE, ttl_s=60))
    store.set_used(rules[0].key, 950)
    refused(store.reserve("b", rules, ONE, ttl_s=60))
    store.set_used(rules[0].key, 0)
    assert (store.used(rules[0].key), store.reserved(rules[0].key)) == (0, 100)
    store.settle(lease, ONE)
    assert (store.used(rules[0].key), store.reserved(rules[0].key)) == (100, 0)
    with pytest.raises(ValueError, match="range"):
        store.set_used(rules[0].key, -1)


def test_window_of_a_key_that_changed_starts_anew_without_touching_the_old_leases():
    store = MemoryStore(clock=Clock())
    minute, day = Rule("k", "rpm", "requests", 1, 60), Rule("k", "rpd", "requests", 1, 86_400)
    by_minute = (minute,)
    lease = admitted(store.reserve("a", by_minute, ONE, ttl_s=60))
    admitted(store.reserve("b", (day,), ONE, ttl_s=60))
    store.release(lease)
    assert store.reserved("k") == 1


def test_context_travels_whole():
    row = record("ü", ttft_ms=None, error="x", stream=False)
    assert decode_context(encode_context(row)) == row


def test_quota_of_a_lease_that_reserved_nothing_of_it_is_still_there_when_it_settles():
    clock = Clock()
    store = MemoryStore(clock=clock)
    rules = (quota(1000),)
    lease = admitted(store.reserve("a", rules, Amounts(1, 0, 0), ttl_s=10_000))
    clock.now_s += 100
    store.tick()
    store.settle(lease, ONE)
    assert store.used(rules[0].key) == 100
