"""Any sequence of frames, cut anywhere: nothing escapes the protocol, nothing piles up, and every call ends once."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.transport.connection import Connection
from extproc.transport.core import GrpcError
from extproc.transport.frames import PREFACE, frame
from extproc.transport.link import Limits
from extproc.transport.register import Register
from extproc.transport.routing import Router
from tests.transport.memory_wire import Wire
from tests.transport.test_h2_wire import OPENING, PATH, message

LIMITS = Limits(max_message_bytes=2000, max_held_messages=3, max_concurrent_streams=4)


class Call:
    """Does what its messages' first octet says."""

    def __init__(self, alive, stream):
        self.alive = alive
        self.stream = stream
        self.ends = 0
        alive.append(self)

    def on_message(self, content):
        assert self.ends == 0, "a message after the end"
        first = content[0] % 8 if content else 0
        if first == 1:
            raise GrpcError(5, "no")
        if first == 2:
            raise ValueError
        if first == 3:
            self.stream.finish(9, "done")
        elif first == 4:
            self.stream.send(content * 3)
        elif first == 5:
            return b"r" * 1900
        return content

    def on_half_close(self):
        assert self.ends == 0
        return bool(len(self.alive) % 2)

    def on_close(self, reason):
        self.ends += 1


sids = st.sampled_from([0, 1, 1, 1, 3, 3, 5, 7, 2, 9, (1 << 31) + 1, (1 << 31) - 1])
words = st.integers(0, (1 << 32) - 1)
grpc_data = st.lists(st.binary(max_size=60).map(message), max_size=4).map(b"".join)
cut_data = st.tuples(grpc_data, st.integers(0, 80)).map(lambda pair: pair[0][: pair[1]])
payloads = {
    0: st.one_of(grpc_data, cut_data, st.just(message(b"\5")), st.binary(max_size=40)),
    1: st.one_of(st.just(PATH), st.just(PATH[:-3]), st.just(b"\x82\x86\x84"), st.binary(max_size=40)),
    2: st.binary(min_size=5, max_size=5),
    3: words.map(lambda code: code.to_bytes(4, "big")),
    4: st.lists(
        st.tuples(st.integers(0, 7), st.one_of(st.sampled_from([0, 1, 10, 65535, 1 << 31]), words)).map(
            lambda pair: pair[0].to_bytes(2, "big") + pair[1].to_bytes(4, "big")
        ),
        max_size=3,
    ).map(b"".join),
    6: st.one_of(st.binary(min_size=8, max_size=8), st.just(b"draining")),
    7: st.binary(min_size=8, max_size=12),
    8: st.one_of(st.integers(0, 3000), words).map(lambda size: size.to_bytes(4, "big")),
    9: st.one_of(st.just(PATH[:9]), st.binary(max_size=20)),
}
valid_frames = st.sampled_from(sorted(payloads)).flatmap(
    lambda kind: st.builds(
        frame, st.just(kind), st.sampled_from([0, 0, 1, 4, 5, 8, 0x20, 0x2D, 255]), sids, payloads[kind]
    )
)
odd_frames = st.builds(frame, st.integers(0, 255), st.integers(0, 255), sids, st.binary(max_size=30))
contents = st.one_of(
    st.binary(max_size=30), st.sampled_from([b"\0say it again", b"\5", b"\5", b"\4much", b"\1", b"\3"])
)
which = st.integers(0, 3)
# Mostly what a peer may do, so that the deep states are reached; broken frames and noise end a connection soon.
meant = st.one_of(
    st.tuples(st.just("open"), st.sampled_from([4, 4, 4, 5, 0]), st.lists(contents, max_size=4)),
    st.tuples(st.just("open"), st.just(4), st.lists(contents, max_size=4)),
    st.tuples(st.just("data"), which, st.lists(contents, min_size=1, max_size=4), st.sampled_from([0, 0, 0, 1])),
    st.tuples(st.just("piece"), which, st.binary(min_size=1, max_size=30)),
    st.tuples(st.just("long"), which, st.integers(1, 2100)),
    st.tuples(st.just("padded"), which, contents, st.integers(0, 20)),
    st.tuples(st.just("end"), which),
    st.tuples(st.just("trailers"), which),
    st.tuples(st.just("reset"), which),
    st.tuples(st.just("widen"), st.one_of(st.none(), which), st.sampled_from([1, 100, 2000, 70_000])),
    st.tuples(st.just("window"), st.sampled_from([0, 1, 7, 300, 65535])),
    st.sampled_from([("fill",), ("empty",), ("empty",), ("tick",), ("tick",), ("push",), ("drain",), ("pong",)]),
)
wild = st.tuples(st.just("raw"), st.one_of(valid_frames, valid_frames, odd_frames, st.binary(max_size=20)))
actions = st.tuples(
    st.lists(meant, min_size=3, max_size=25), st.lists(wild, max_size=3), st.lists(meant, max_size=5)
).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


class Peer:
    """Turns actions into octets, with stream numbers that make sense."""

    def __init__(self):
        self.opened = []

    def sid(self, index):
        return self.opened[-1 - index % len(self.opened)]

    def octets(self, action):
        if not self.opened and len(action) > 1 and action[0] not in {"open", "window", "raw"}:
            return b""  # an idle stream: the connection would end here
        match action:
            case "open", flags, messages:
                self.opened.append(2 * len(self.opened) + 1)
                sid = self.opened[-1]
                if flags:
                    head = frame(1, flags, sid, PATH)
                else:
                    head = frame(1, 0, sid, PATH[:7]) + frame(9, 0, sid, PATH[7:9]) + frame(9, 4, sid, PATH[9:])
                return head + b"".join(frame(0, 0, sid, message(content)) for content in messages if flags != 5)
            case "data", index, messages, flags:
                return frame(0, flags, self.sid(index), b"".join(map(message, messages)))
            case "piece", index, octets:
                return frame(0, 0, self.sid(index), octets)
            case "long", index, size:
                whole = message(b"\0" * size)
                return b"".join(frame(0, 0, self.sid(index), whole[at : at + 500]) for at in range(0, len(whole), 500))
            case "padded", index, content, size:
                return frame(0, 8, self.sid(index), bytes((size,)) + message(content) + b"\0" * size)
            case "end", index:
                return frame(0, 1, self.sid(index))
            case "trailers", index:
                return frame(1, 5, self.sid(index), b"\x00\x01a\x01b")
            case "reset", index:
                return frame(3, 0, self.sid(index), b"\0\0\0\x08")
            case "widen", index, size:
                return frame(8, 0, 0 if index is None else self.sid(index), size.to_bytes(4, "big"))
            case "window", size:
                return frame(4, 0, 0, b"\0\4" + size.to_bytes(4, "big"))
            case ("pong",):
                return frame(6, 1, 0, b"draining")
            case "raw", octets:
                return octets
        return b""


@settings(max_examples=500, deadline=None)
@given(actions, st.lists(st.integers(1, 90), max_size=40), st.booleans())
def test_any_octets_in_any_pieces(actions, cuts, acknowledged):
    asyncio.run(play(actions, cuts, acknowledged))


async def play(actions, cuts, acknowledged):
    failures = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: failures.append(context))
    calls = []
    wire = Wire()
    connection = Connection(Router({"/t/Call": lambda stream: Call(calls, stream)}), LIMITS, Register(), loop)
    wire.protocol = connection
    connection.connection_made(wire)
    peer = Peer()
    sizes = iter(cuts)
    held = OPENING if acknowledged else PREFACE + frame(4, 0, 0)
    for action in [("tick",), *actions]:
        if action[0] == "fill":
            wire.room = False
        elif action[0] == "empty":
            wire.room = True
            if connection._paused and not wire.closed:
                connection.resume_writing()
        elif action[0] == "drain":
            connection.begin_drain()
        elif action[0] == "push" and calls:
            calls[-1].stream.send(b"p" * 700)
        elif action[0] == "tick":
            await asyncio.sleep(0)
        held += peer.octets(action)
        while held and wire.reading and not wire.closed:
            size = next(sizes, 4096)
            piece, held = held[:size], held[size:]
            connection.data_received(piece)
        check(connection)
    for call in calls:
        call.stream.send(b"late")
    await asyncio.sleep(0)
    check(connection)
    wire.closed = True
    connection.connection_lost(None)
    assert all(call.ends == 1 for call in calls)
    assert connection.ended.done()
    check(connection)
    assert not failures


def check(connection):
    streams = connection._streams
    assert len(streams) <= LIMITS.max_concurrent_streams
    assert len(connection._buffer) < 1 << 16
    assert len(connection._forgotten) <= 1024
    assert len(connection._gaps) <= 16
    backlogs = [stream.backlog for stream in streams.values() if stream.backlog is not None]
    assert connection._held_input_bytes == sum(backlog.parts_bytes for backlog in backlogs)
    assert connection._held_output_bytes == sum(backlog.output_bytes for backlog in backlogs)
    assert connection._held_output_bytes <= 4 * LIMITS.max_message_bytes + 8000
    for backlog in backlogs:
        assert backlog.parts_bytes == sum(map(len, backlog.parts))
        assert backlog.output_bytes == sum(map(len, backlog.output))
    assert set(connection._blocked) <= set(streams)
    assert connection._send_window >= 0
    assert connection._transport is not None or not streams
