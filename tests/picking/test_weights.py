"""Shares, fairness, in-flight: what a healthy fleet gets."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from apis.policy import Endpoint, Route
from extproc.picking import Outcome, Picker


def endpoint(*routes: Route, name: str = "m") -> Endpoint:
    return Endpoint("ns", name, name, routes)


def route(name: str, weight: int, engines: int) -> Route:
    return Route(name, weight, tuple(f"{name}:{port}" for port in range(engines)))


def picker_for(*endpoints: Endpoint, defaults: tuple[str, ...] = ()) -> Picker:
    picker = Picker()
    picker.set_policy(endpoints, defaults)
    return picker


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 3)), min_size=1, max_size=5))
def test_shares_follow_the_weights_of_routes_that_have_engines(shape):
    routes = [route(f"r{index}", weight, engines) for index, (weight, engines) in enumerate(shape)]
    target = endpoint(*routes)
    picker = picker_for(target)
    live = {each.name: each.weight for each in routes if each.weight and each.addresses}
    total = sum(live.values())
    if not live:
        assert picker.pick(target) is None
        return
    drawn = Counter(picker.pick(target).route for _ in range(total))
    # One full cycle of a smooth weighted round robin is exact, not only near.
    assert drawn == live


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=4), st.integers(20, 200))
def test_no_run_of_picks_strays_from_the_weights(weights, runs):
    target = endpoint(*(route(f"r{index}", weight, 1) for index, weight in enumerate(weights)))
    picker = picker_for(target)
    drawn = Counter()
    for count in range(1, runs):
        drawn[picker.pick(target).route] += 1
        for index, weight in enumerate(weights):
            assert abs(drawn[f"r{index}"] - count * weight / sum(weights)) < len(weights)


def test_weight_zero_is_neither_drawn_nor_a_fallback():
    target = endpoint(route("on", 1, 2), route("off", 0, 2))
    picker = picker_for(target)
    for _ in range(20):
        pick = picker.pick(target)
        assert all(address.startswith("on:") for address in pick.addresses)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 40))
def test_addresses_are_different_and_at_most_three(first, second, picks):
    target = endpoint(route("a", 3, first), route("b", 1, second))
    picker = picker_for(target)
    for _ in range(picks):
        addresses = picker.pick(target).addresses
        assert len(addresses) == len(set(addresses)) == min(3, first + second)


def test_an_address_in_two_routes_is_no_fallback_for_itself():
    target = endpoint(Route("a", 1, ("x:1", "x:1")), Route("b", 1, ("x:1",)))
    picker = picker_for(target)
    assert picker.pick(target).addresses == ("x:1",)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 7), max_size=60))
def test_the_least_loaded_engine_is_chosen(engines, busy):
    target = endpoint(route("a", 1, engines))
    picker = picker_for(target)
    load = Counter({f"a:{port}": 0 for port in range(engines)})
    for port in busy:
        picker.begin(f"a:{port % engines}")
        load[f"a:{port % engines}"] += 1
    for _ in range(engines * 2):
        assert load[picker.pick(target).addresses[0]] == min(load.values())


def test_idle_engines_take_turns():
    target = endpoint(route("a", 1, 4))
    picker = picker_for(target)
    chosen = [picker.pick(target).addresses[0] for _ in range(40)]
    assert set(Counter(chosen).values()) == {10}
    assert all(before != after for before, after in pairwise(chosen))


def test_concurrent_requests_spread_evenly():
    target = endpoint(route("a", 1, 3))
    picker = picker_for(target)
    for _ in range(300):
        picker.begin(picker.pick(target).addresses[0])
    assert [state.in_flight for state in picker.snapshot()] == [100, 100, 100]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a:0", "a:1", "gone:1"]), st.sampled_from(Outcome))))
def test_in_flight_is_never_negative(steps):
    target = endpoint(route("a", 1, 2))
    picker = picker_for(target)
    expected = Counter()
    for begins, address, outcome in steps:
        if begins:
            picker.begin(address)
            expected[address] += 1
        else:
            picker.end(address, outcome)
            expected[address] = max(0, expected[address] - 1)
        assert {state.address: state.in_flight for state in picker.snapshot()} == {
            "a:0": expected["a:0"],
            "a:1": expected["a:1"],
        }


def test_a_changed_weight_applies_to_the_next_pick():
    before = endpoint(route("a", 1, 1), route("b", 0, 1))
    picker = picker_for(before)
    assert picker.pick(before).route == "a"
    picker.set_policy([endpoint(route("a", 0, 1), route("b", 1, 1))])
    # Also for a request that still holds the endpoint of the old snapshot.
    assert {picker.pick(before).route for _ in range(10)} == {"b"}


def test_load_survives_a_policy_change():
    target = endpoint(route("a", 1, 2))
    picker = picker_for(target)
    picker.begin("a:0")
    picker.set_policy([endpoint(Route("a", 1, ("a:0", "a:1", "a:2")))])
    assert {state.address: state.in_flight for state in picker.snapshot()} == {"a:0": 1, "a:1": 0, "a:2": 0}


def test_an_engine_that_left_under_load_comes_back_with_it():
    target = endpoint(route("a", 1, 2))
    picker = picker_for(target)
    picker.begin("a:0")
    picker.begin("a:1")
    picker.set_policy([endpoint(Route("a", 1, ("a:1",)))])
    assert [state.address for state in picker.snapshot()] == ["a:1"]
    picker.end("a:1", Outcome.OK)
    picker.set_policy([target])
    assert {state.address: state.in_flight for state in picker.snapshot()} == {"a:0": 1, "a:1": 0}


def test_the_rotation_goes_on_over_an_unrelated_policy_change():
    target, other = endpoint(route("a", 1, 2)), endpoint(route("b", 1, 1), name="other")
    picker = picker_for(target)
    first = picker.pick(target).addresses[0]
    picker.set_policy([endpoint(route("a", 1, 2)), other])
    assert picker.pick(target).addresses[0] != first


def test_endpoints_without_routes_share_the_default_engines():
    one, two = Endpoint("ns", "one", "one", None), Endpoint("ns", "two", "two", None)
    picker = picker_for(one, two, defaults=("d:1", "d:2"))
    assert {picker.pick(one).addresses[0], picker.pick(two).addresses[0]} == {"d:1", "d:2"}
    assert picker.pick(one).route == ""
    picker.set_policy([one], ("d:3",))
    assert picker.pick(one).addresses == ("d:3",)
    assert picker.pick(two) is None


def test_an_endpoint_with_an_empty_route_list_gets_no_default_engine():
    target = endpoint()
    assert picker_for(target, defaults=("d:1",)).pick(target) is None


def test_an_engine_that_is_busy_for_long_does_not_double_the_share_of_the_next():
    target = endpoint(route("a", 1, 4))
    picker = picker_for(target)
    picker.begin("a:0")
    shares = Counter(picker.pick(target).addresses[0] for _ in range(300))
    assert shares == {"a:1": 100, "a:2": 100, "a:3": 100}
