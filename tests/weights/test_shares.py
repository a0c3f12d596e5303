"""What must hold of the weights whatever the engines say."""

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apis.resources import ArksEndpoint
from controller.reconcile.desired.endpoint import MAX_WEIGHT, Backend
from controller.weights.model import EngineLoad, Share
from controller.weights.shares import DAMPING, weights_for

ENGINES = st.builds(
    EngineLoad,
    st.just("10.0.0.1:80"),
    st.booleans(),
    st.booleans(),
    st.integers(0, 500),
    st.integers(0, 500),
    st.floats(0, 1),
    st.floats(0, 60),
)
LOADS = st.lists(ENGINES, max_size=4)
NAMES = ("a", "b", "c")


def endpoint(policy: str = "load", **spec) -> ArksEndpoint:
    return ArksEndpoint.model_validate(
        {
            "apiVersion": "arks.ai/v1",
            "kind": "ArksEndpoint",
            "metadata": {"name": "qwen", "namespace": "team-a"},
            "spec": {"gatewayRef": {"name": "eg"}, "weightPolicy": policy, **spec},
        }
    )


def busy(waiting: int = 0, kv: float = 0.0, ttft_s: float = 0.0, healthy: bool = True) -> EngineLoad:
    return EngineLoad("10.0.0.1:80", healthy, True, 1, waiting, kv, ttft_s)


def settled(backends, loads, previous=None, steps: int = 60) -> dict[str, Share]:
    shares = previous or {}
    for _ in range(steps):
        shares = weights_for(endpoint(), backends, loads, shares)
    return shares


@pytest.mark.parametrize("policy", ["static", "capacity"])
def test_only_the_load_policy_looks_at_the_load(policy):
    backends = [Backend("a", 5), Backend("b", 10)]
    shares = weights_for(endpoint(policy), backends, {"a": [busy(waiting=99)], "b": []}, {})
    assert {name: share.weight for name, share in shares.items()} == {"a": 5, "b": 10}


def test_even_load_of_any_height_leaves_the_capacities_shares():
    backends = [Backend("a", 1, 1), Backend("b", 3, 3)]
    for load in (busy(), busy(waiting=50, kv=0.9), busy(waiting=5, ttft_s=2.0)):
        shares = settled(backends, {"a": [load], "b": [load] * 3})
        assert {name: share.weight for name, share in shares.items()} == {"a": 100, "b": 300}


def test_a_dead_engine_gets_nothing_at_once_and_ramps_when_it_is_back():
    backends = [Backend("a", 1), Backend("b", 1)]
    shares = settled(backends, {"a": [busy()], "b": [busy()]})
    shares = weights_for(endpoint(), backends, {"a": [busy(healthy=False)], "b": [busy()]}, shares)
    assert (shares["a"].weight, shares["b"].weight) == (0, 100)
    seen = []
    for _ in range(30):
        shares = weights_for(endpoint(), backends, {"a": [busy()], "b": [busy()]}, shares)
        seen.append(shares["a"].weight)
    assert seen[0] == 10
    assert seen == sorted(seen)
    assert all(later - earlier <= 11 for earlier, later in itertools.pairwise(seen))
    assert seen[-1] >= 95


def test_one_dead_replica_of_four_costs_its_backend_a_quarter():
    backends = [Backend("a", 4, 4), Backend("b", 4, 4)]
    shares = settled(backends, {"a": [busy(), busy(), busy(), busy(healthy=False)], "b": [busy()] * 4})
    assert shares["a"].weight / shares["b"].weight == pytest.approx(0.75, abs=0.06)


def test_a_new_backend_ramps_and_the_first_ones_do_not():
    backends = [Backend("a", 1), Backend("b", 1)]
    shares = weights_for(endpoint(), backends, {"a": [busy()], "b": [busy()]}, {})
    assert shares["a"].weight == shares["b"].weight == 100
    with_new = [*backends, Backend("c", 1)]
    shares = weights_for(endpoint(), with_new, {key: [busy()] for key in NAMES}, shares)
    assert shares["c"].weight == 10
    assert settled(with_new, {key: [busy()] for key in NAMES}, shares)["c"].weight >= 95


def test_where_all_seem_dead_capacity_counts():
    """A network policy between us and the engines must not close an endpoint that serves."""
    dead = [busy(healthy=False)]
    shares = settled([Backend("a", 1), Backend("b", 2, 2)], {"a": dead, "b": dead})
    assert shares["b"].weight == 2 * shares["a"].weight > 0


def test_engines_that_tell_nothing_count_as_the_usual():
    backends = [Backend("a", 1), Backend("b", 1), Backend("c", 1)]
    unknown = [EngineLoad("10.0.0.1:80", healthy=True, known=False)]
    shares = settled(backends, {"a": [busy()], "b": [busy(waiting=12)], "c": unknown})
    assert shares["b"].weight < shares["c"].weight < shares["a"].weight


def test_beside_routes_that_users_wrote_weights_keep_the_same_measure():
    given_route = {"name": "other", "port": 80, "weight": 5}
    shares = weights_for(endpoint(routeConfigs=[given_route]), [Backend("a", 5)], {"a": [busy()]}, {})
    assert shares["a"].weight == 5


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(NAMES, LOADS)), st.lists(st.integers(0, 10**6), min_size=3, max_size=3))
def test_weights_stay_within_what_the_api_takes_and_never_all_vanish(loads, capacities):
    backends = [Backend(name, weight) for name, weight in zip(NAMES, capacities, strict=True)]
    shares = {}
    for _ in range(5):
        shares = weights_for(endpoint(), backends, loads, shares)
        assert all(0 <= share.weight <= MAX_WEIGHT for share in shares.values())
        assert (sum(share.weight for share in shares.values()) > 0) == any(capacities)
        for each in backends:
            share = shares[each.application]
            alive = share.score > 0
            assert not alive or share.score >= DAMPING.floor - 1e-9
            assert (share.weight > 0) == (alive and each.weight > 0)


def test_at_the_floor_more_load_takes_nothing_from_one_that_tells_nothing():
    dead = busy(healthy=False)

    def part(kv: float) -> float:
        shares = weights_for(
            endpoint(), [Backend(name, 1) for name in NAMES], {"a": [busy(10, kv), dead, dead], "c": [busy()]}, {}
        )
        return shares["a"].score / sum(share.score for share in shares.values())

    assert part(1.0) == part(0.0)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(NAMES, LOADS)), st.data())
def test_more_load_never_earns_more_traffic(loads, data):
    backends = [Backend(name, 1) for name in NAMES]
    index = data.draw(st.integers(0, max(0, len(loads["a"]) - 1)))
    if not loads["a"] or not loads["a"][index].healthy or not loads["a"][index].known:
        return
    heavier = copy.deepcopy(loads)
    one = heavier["a"][index]
    heavier["a"][index] = one._replace(
        waiting=one.waiting + data.draw(st.integers(0, 50)),
        kv_usage=min(1.0, one.kv_usage + data.draw(st.floats(0, 1))),
    )

    def fraction(given) -> float:
        shares = weights_for(endpoint(), backends, given, {})
        return shares["a"].score / sum(share.score for share in shares.values())

    assert fraction(heavier) <= fraction(loads) + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(NAMES, LOADS)), st.fixed_dictionaries(dict.fromkeys(NAMES, LOADS)))
def test_constant_load_ends_in_constant_weights_without_turning_back(before, after):
    backends = [Backend(name, 2, 2) for name in NAMES]
    shares = settled(backends, before, steps=10)
    history = [shares]
    for _ in range(80):
        history.append(weights_for(endpoint(), backends, after, history[-1]))
    for name in NAMES:
        scores = [shares[name].score for shares in history[2:]]
        ups = [later - earlier for earlier, later in itertools.pairwise(scores)]
        assert all(step >= -1e-9 for step in ups) or all(step <= 1e-9 for step in ups), scores
        weights = [shares[name].weight for shares in history]
        assert len(set(weights[-20:])) == 1, weights


@pytest.mark.parametrize("speeds", [(10.0, 10.0), (10.0, 5.0), (10.0, 2.0)])
def test_the_loop_through_real_queues_does_not_swing(speeds):
    """Closed loop: arrivals follow the weights, queues follow the arrivals, weights follow the queues."""
    backends = [Backend("a", 1), Backend("b", 1)]
    arrivals = 0.8 * sum(speeds)
    queues, shares = {"a": 0.0, "b": 0.0}, {}
    history = []
    for _ in range(400):
        loads = {name: [busy(waiting=int(queue))] for name, queue in queues.items()}
        shares = weights_for(endpoint(), backends, loads, shares)
        total = sum(share.weight for share in shares.values())
        for name, speed in zip(("a", "b"), speeds, strict=True):
            queues[name] = max(0.0, queues[name] + arrivals * shares[name].weight / total - speed)
        history.append(shares["a"].weight / total)
    late = history[-100:]
    assert max(late) - min(late) < 0.25, (min(late), max(late))
    # The slower one's queue stays bounded: without weights it would grow by seconds of work each second.
    assert max(queues.values()) < 60, queues
