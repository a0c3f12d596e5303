"""extproc's end against the controller's end: whole states, changes, and every way in which they can be lost."""

import asyncio
import os
import stat
import time

import grpc.aio
import pytest

from apis import records
from apis.records import METHOD
from apis.wire.snapshot_pb2 import Change, EngineLoad, FollowRequest, FollowResponse, Load, Pulse
from controller.snapshot import feed as feeds
from controller.snapshot.feed import Feed
from extproc.snapshot import kept
from extproc.snapshot.index import LiveIndex, Principal
from extproc.snapshot.replica import Replica
from tests.snapshot_stream.world import (
    Following,
    drop,
    endpoint,
    held,
    publishing,
    put,
    quota,
    saying,
    token,
    until,
)


async def test_a_change_reaches_the_policy_and_nothing_else_is_remade(tmp_path):
    feed = Feed()
    put(feed, token("alice"), token("bob", 2), quota(), endpoint("qwen", "10.0.0.1:80"))
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        before = following.policy
        assert held(before) == {token("alice"), token("bob", 2), quota(), endpoint("qwen", "10.0.0.1:80")}
        put(feed, token("alice", rpm=9))
        await following.shows(token("alice", rpm=9), token("bob", 2), quota(), endpoint("qwen", "10.0.0.1:80"))
        assert following.policy.tokens["team-a", "bob"] is before.tokens["team-a", "bob"]
        assert following.policy.endpoints is before.endpoints
        assert before.tokens["team-a", "alice"] == token("alice"), "a policy that was handed out changed"


async def test_a_revoked_token_is_refused_at_once(tmp_path):
    feed, live = Feed(), LiveIndex()
    put(feed, token("alice"), token("bob", 2))
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        live.replace(following.policy)
        assert isinstance(live.current.principals[(1).to_bytes(32)], Principal)
        drop(feed, token("alice"))
        await following.shows(token("bob", 2))
        await live.apply(following.policy)
        assert (1).to_bytes(32) not in live.current.principals


async def test_a_lost_connection_goes_on_with_changes_alone(tmp_path):
    feed = Feed()
    put(feed, *(token(f"t{index}", index) for index in range(1, 400)))
    async with publishing(feed, tmp_path):
        following = Following(tmp_path)
        async with following.running():
            await until(lambda: following.source.connections >= 2)  # start's own, then run's
            parts = 0
            whole = feed.parts

            def counted():
                nonlocal parts
                parts += 1
                return whole()

            feed.parts = counted
    async with following_again(following, feed, tmp_path):
        put(feed, token("late", 999))
        await until(lambda: ("team-a", "late") in following.policy.tokens)
    assert parts == 0, "the whole state was sent again"
    assert following.source.resyncs == 0


def following_again(following, feed, folder):
    """The server comes back with the same state, and the source runs on without a new start."""

    class Again:
        async def __aenter__(self):
            self.server = publishing(feed, folder)
            await self.server.__aenter__()
            self.task = asyncio.create_task(following.source.run())

        async def __aexit__(self, *_):
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            await self.server.__aexit__(None, None, None)

    return Again()


async def test_whoever_was_away_too_long_gets_the_whole_state(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "KEPT_BYTES", 500)
    feed = Feed()
    put(feed, token("alice"))
    following = Following(tmp_path)
    async with publishing(feed, tmp_path):
        await following.source.start()
    for index in range(20):
        put(feed, token(f"t{index}", index + 10))
    drop(feed, token("alice"))
    assert feed.since(1) is None
    async with following_again(following, feed, tmp_path):
        await following.shows(*(token(f"t{index}", index + 10) for index in range(20)))
    assert following.source.resyncs == 0


async def test_another_life_of_the_controller_is_no_continuation(tmp_path):
    first, second = Feed(), Feed()
    put(first, token("alice"), token("bob", 2))
    put(second, token("carol", 3))
    assert first.generation == second.generation
    following = Following(tmp_path)
    async with publishing(first, tmp_path):
        await following.source.start()
    async with following_again(following, second, tmp_path):
        await following.shows(token("carol", 3))


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("a generation is missing", lambda feed: FollowResponse(change=Change(generation=feed.generation + 2))),
        ("a change comes twice", lambda feed: feed.since(feed.generation - 1)[0]),
        (
            "a change was altered on its way",
            lambda feed: FollowResponse(change=Change(generation=feed.generation + 1, checksum=b"x" * 32)),
        ),
        (
            "the states have drifted apart",
            lambda feed: FollowResponse(pulse=Pulse(ready=True, generation=feed.generation, checksum=b"x" * 32)),
        ),
        (
            "the controller is generations ahead",
            lambda feed: FollowResponse(pulse=Pulse(ready=True, generation=feed.generation + 1)),
        ),
        ("what comes is no message", lambda _: b"\xff\xff\xff"),
    ],
)
async def test_what_does_not_fit_is_asked_for_anew(tmp_path, name, second):
    feed = Feed()
    put(feed, token("alice"))
    put(feed, quota())

    def script(number, _request):
        if number > 2:
            put(feed, token("healed", 7))
        yield from feed.parts()
        if number == 2:
            yield second(feed)

    async with saying(tmp_path, script) as requests, Following(tmp_path).running() as following:
        await following.shows(token("alice"), quota(), token("healed", 7))
        assert len(requests) == 3
        if name != "what comes is no message":
            assert requests[2].epoch == "", "it must ask for everything"
            assert following.source.resyncs == 1
        assert following.errors, "nobody was told"
        assert all(held(policy) >= {token("alice"), quota()} for policy in following.policies), name


async def test_half_a_state_is_never_in_force(tmp_path):
    feed = Feed()
    put(feed, *(token(f"t{index}", index + 1) for index in range(400)))
    pieces = list(feed.parts())
    assert len(pieces) > 2

    def script(number, _request):
        if number == 2:
            yield from pieces[:2]  # and then silence
        else:
            yield from pieces

    async with saying(tmp_path, script) as requests, Following(tmp_path, quiet_s=0.1).running() as following:
        await until(lambda: len(requests) >= 4)
        assert {len(policy.tokens) for policy in following.policies} == {400}


async def test_nothing_is_told_before_the_controller_has_seen_everything(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    async with publishing(feed, tmp_path, ready=False) as ready:
        following = Following(tmp_path, quiet_s=2.0)
        starting = asyncio.create_task(following.source.start())
        await asyncio.sleep(2.4)
        assert not starting.done()
        assert not following.policies
        assert following.source.connections == 1, "it took a controller that is not ready for a silent one"
        ready.set()
        await starting
        assert held(following.policy) == {token("alice")}


async def test_a_dead_controller_leaves_the_policy_and_its_age_grows(tmp_path):
    feed, now = Feed(), [1000.0]
    put(feed, token("alice"))
    following = Following(tmp_path, clock=lambda: now[0])
    async with publishing(feed, tmp_path):
        await following.source.start()
        task = asyncio.create_task(following.source.run())
        await until(lambda: following.source.connections >= 2)
        now[0] = 1010.0
        await until(lambda: following.source.status.loaded_at_s == 1010.0)
    await until(lambda: not following.source.status.ok)
    now[0] = 1100.0
    assert following.source.status.loaded_at_s == 1010.0
    assert held(following.policy) == {token("alice")}
    assert following.source.loads == {}
    async with publishing(feed, tmp_path):
        await until(lambda: following.source.status.ok)
        assert following.source.status.loaded_at_s == 1100.0
        assert len(following.policies) == 1, "the same policy was handed out again"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(following.errors) < 4, "each try was reported"


async def test_an_api_server_that_the_controller_cannot_follow_counts_as_age(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    async with (
        publishing(feed, tmp_path, view_age_s=50.0),
        Following(tmp_path, clock=lambda: 1000.0).running() as following,
    ):
        await until(lambda: following.source.connections >= 2)
        put(feed, token("bob", 2))
        await until(lambda: len(following.policies) == 2)
        following.source.status = type(following.source.status)(generation=2)
        await until(lambda: following.source.status.loaded_at_s == 950.0)


async def test_a_silent_controller_is_left_for_a_speaking_one(tmp_path):
    feed = Feed()
    put(feed, token("alice"))

    def script(_number, _request):
        yield from feed.parts()

    async with saying(tmp_path, script) as requests, Following(tmp_path, quiet_s=0.1).running() as following:
        await until(lambda: len(requests) >= 3)
        assert not following.source.status.ok or following.source.connections > 2
        assert any("silent" in error for error in following.errors)


async def test_a_restart_without_the_controller_serves_the_kept_policy(tmp_path):
    feed = Feed()
    put(feed, token("alice"), quota(), endpoint("qwen", "10.0.0.1:80"))
    async with publishing(feed, tmp_path), Following(tmp_path).running():
        pass  # its end writes what is not written yet
    file = tmp_path / kept.FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    long_ago = time.time() - 3600
    os.utime(file, (long_ago, long_ago))
    again = Following(tmp_path, first_s=0.2)
    await again.source.start()
    assert held(again.policy) == {token("alice"), quota(), endpoint("qwen", "10.0.0.1:80")}
    assert again.source.status.generation == 1
    assert not again.source.status.ok
    assert time.time() - again.source.status.loaded_at_s == pytest.approx(3600, abs=60)


async def test_the_controller_comes_before_the_kept_policy(tmp_path):
    feed = Feed()
    put(feed, token("alice"), token("revoked", 2))
    async with publishing(feed, tmp_path), Following(tmp_path).running():
        pass
    drop(feed, token("revoked", 2))
    async with publishing(feed, tmp_path):
        again = Following(tmp_path)
        await again.source.start()
        assert [held(policy) for policy in again.policies] == [{token("alice")}]


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-40], lambda data: data.replace(b"alice", b"mallo"), lambda _: b""]
)
async def test_a_damaged_kept_policy_is_not_served(tmp_path, harm):
    file = tmp_path / kept.FILE
    feed = Feed()
    put(feed, token("alice"))
    async with publishing(feed, tmp_path), Following(tmp_path).running():
        pass
    file.write_bytes(harm(file.read_bytes()))
    again = Following(tmp_path, first_s=0.1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.6):
            await again.source.start()
    assert not again.policies


async def test_a_change_is_kept_soon_so_that_a_crash_revives_no_token(tmp_path):
    feed = Feed()
    put(feed, token("alice"), token("revoked", 2))
    file = tmp_path / kept.FILE
    async with publishing(feed, tmp_path), Following(tmp_path).running():
        await until(file.exists)
        drop(feed, token("revoked", 2))
        await until(lambda: held(kept.load(file)[0]) == {token("alice")})


async def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    following = Following(tmp_path)
    following.source._file = tmp_path / "missing" / kept.FILE
    async with publishing(feed, tmp_path), following.running():
        await asyncio.sleep(0.7)
        put(feed, token("bob", 2))
        await following.shows(token("alice"), token("bob", 2))


async def test_one_unreadable_record_takes_no_other_with_it(tmp_path):
    """A later controller may write what this extproc does not know."""
    feed = Feed()
    put(feed, token("alice"), token("odd", 2))
    place = (1, "team-a", "odd")
    payload = feed._records[place].replace(b"rpm", b"rph")
    feed.checksum = records.added(feed.checksum, records.hash_of(place, payload), feed._hashes[place])
    feed._records[place] = payload
    feed._hashes[place] = records.hash_of(place, payload)
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        assert held(following.policy) == {token("alice")}
        assert [str(note) for note in following.source.status.notes if "odd" in str(note)]
        put(feed, token("bob", 3))
        await following.shows(token("alice"), token("bob", 3))
        put(feed, token("odd", 2))
        await following.shows(token("alice"), token("bob", 3), token("odd", 2))
        assert not following.source.status.notes
        assert following.source.resyncs == 0


async def test_kinds_of_a_later_controller_are_no_gap(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    place, payload = (9, "team-a", "news"), b"\x80"
    feed._records[place], feed._hashes[place] = payload, records.hash_of(place, payload)
    feed.checksum = records.added(feed.checksum, feed._hashes[place])
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        assert held(following.policy) == {token("alice")}
        put(feed, token("bob", 2))
        await following.shows(token("alice"), token("bob", 2))
        feed.change([(place, None)])
        put(feed, token("carol", 3))
        await following.shows(token("alice"), token("bob", 2), token("carol", 3))
        assert following.source.resyncs == 0


async def test_load_arrives_and_goes_with_the_controller(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        load = Load(engines=[EngineLoad(address="10.0.0.1:80", running=3, waiting=2, kv_usage=0.5, healthy=True)])
        feed.tell_load(FollowResponse(load=load).SerializeToString())
        await until(lambda: following.source.loads)
        assert following.source.loads["10.0.0.1:80"][:4] == (3, 2, 0.5, True)


async def test_host_names_behind_routes_are_resolved_here(tmp_path):
    from extproc.snapshot.hosts import Hosts

    async def lookup(host, port):
        return {"one": ("10.1.1.1:80",), "two": ("10.2.2.2:80",)}[host]

    feed = Feed()
    put(feed, endpoint("qwen", hosts=("one:80",)))
    async with publishing(feed, tmp_path), Following(tmp_path, hosts=Hosts(lookup)).running() as following:
        assert following.policy.endpoints["team-a", "qwen"].routes[0].addresses == ("10.1.1.1:80",)
        put(feed, endpoint("qwen", hosts=("two:80",)))
        await until(lambda: following.policy.endpoints["team-a", "qwen"].routes[0].addresses == ("10.2.2.2:80",))


async def test_a_socket_left_by_a_killed_controller_is_taken_over_and_is_ours_alone(tmp_path):
    feed = Feed()
    put(feed, token("alice"))
    async with publishing(feed, tmp_path):
        pass
    async with publishing(feed, tmp_path), Following(tmp_path).running() as following:
        assert stat.S_IMODE((tmp_path / "policy.sock").stat().st_mode) & 0o177 == 0
        await following.shows(token("alice"))


async def test_a_follower_that_does_not_read_holds_up_nobody_and_ends_with_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "KEPT_BYTES", 100_000)
    feed = Feed()
    put(feed, token("alice"))
    async with (
        publishing(feed, tmp_path),
        Following(tmp_path).running() as quick,
        grpc.aio.insecure_channel(f"unix:{tmp_path / 'policy.sock'}") as channel,
    ):
        call = channel.unary_stream(METHOD, request_serializer=FollowRequest.SerializeToString)(FollowRequest())
        said = FollowResponse.FromString(await call.read())
        for turn in range(60):
            put(feed, *(token(f"t{index}", index + 1, rpm=turn + 1) for index in range(100)))
            await asyncio.sleep(0)
        await until(lambda: quick.source.status.tokens == 101 and quick.policy == quick.source._replica.policy)
        assert feed._kept_bytes <= 100_000
        replica = Replica()
        async with asyncio.timeout(60):
            # Whether it got everything after all, or lost its place and gets the whole state, is up to the buffers.
            while True:
                match said.WhichOneof("event"):
                    case "part":
                        replica.part(said.part)
                    case "change" if replica.epoch:
                        replica.change(said.change)
                    case "pulse" if said.pulse.generation == feed.generation:
                        assert replica.agrees(said.pulse)
                        break
                said = FollowResponse.FromString(await call.read())
        assert replica.policy == quick.policy
