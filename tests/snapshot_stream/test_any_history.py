"""Whatever happens to a state and to its followers, both sides end with the same, and can prove it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from apis.wire.snapshot_pb2 import FollowResponse
from controller.snapshot.feed import Feed
from extproc.snapshot.replica import GapError, Replica
from tests.snapshot_stream.world import drop, endpoint, held, put, quota, token

RECORDS = st.one_of(
    st.builds(token, st.sampled_from("abcdef"), st.integers(1, 6), st.integers(1, 3)),
    st.builds(quota, st.sampled_from("ab"), st.integers(1, 3)),
    st.builds(endpoint, st.sampled_from("ab"), st.sampled_from(("10.0.0.1:80", "10.0.0.2:80"))),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(RECORDS, min_size=1, max_size=3)),
        st.tuples(st.just("drop"), st.lists(RECORDS, min_size=1, max_size=2)),
        st.tuples(st.just("hear"), st.integers(1, 3)),
        st.tuples(st.just("lose"), st.just(0)),
        st.tuples(st.just("forget"), st.integers(0, 3)),
    ),
    max_size=25,
)


def told(feed: Feed, replica: Replica) -> list[FollowResponse]:
    known = feed.knows(replica.epoch, replica.generation, replica.checksum)
    raw = feed.since(replica.generation) if known else list(feed.parts())
    return [FollowResponse.FromString(each) for each in raw or ()]


def take(replica: Replica, message: FollowResponse) -> None:
    if message.WhichOneof("event") == "part":
        replica.part(message.part)
    else:
        replica.change(message.change)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_a_follower_ends_with_the_publishers_state(steps):
    feed, replica, truth = Feed(), Replica(), {}
    pending: list[FollowResponse] = []
    for what, value in steps:
        if what in {"put", "drop"}:
            items = {(type(item), item.namespace, item.name): item for item in value}
            (put if what == "put" else drop)(feed, *items.values())
            for key, item in items.items():
                truth.pop(key, None)
                if what == "put":
                    truth[key] = item
        elif what == "hear":
            pending = pending or told(feed, replica)
            for message in pending[:value]:
                take(replica, message)
            pending = pending[value:]
        elif what == "lose":
            pending = []
            replica.abandon()
        else:
            while len(feed._kept) > value:
                feed._kept_bytes -= len(feed._kept.popleft())
    replica.abandon()
    for message in told(feed, replica):
        take(replica, message)
    assert held(replica.policy) == set(truth.values())
    assert replica.agrees(FollowResponse.FromString(feed.pulse(0.0)).pulse)


@settings(max_examples=80, deadline=None)
@given(st.lists(RECORDS, min_size=2, max_size=12), st.data())
def test_changes_out_of_order_or_lost_are_noticed(items, data):
    feed, replica = Feed(), Replica()
    for message in told(feed, replica):
        take(replica, message)
    for item in items:
        put(feed, item)
    changes = told(feed, replica)
    order = data.draw(st.permutations(range(len(changes))))
    count = data.draw(st.integers(0, len(changes)))
    wrong = order[:count] != list(range(count))
    before = replica.policy
    noticed = False
    for index in order[:count]:
        try:
            take(replica, changes[index])
        except GapError:
            noticed = True
            break
        before = replica.policy
    assert noticed == wrong
    assert replica.policy is before, "what did not fit took effect"
