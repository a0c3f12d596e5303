"""HTTP/2 as such: an independent client's flow control, drains and misuse, and raw octets no client would send."""

import asyncio
import contextlib
import time

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import uvloop

from extproc.transport.core import CloseReason
from extproc.transport.frames import PREFACE, ErrorCode, frame, goaway
from extproc.transport.link import Limits
from tests.transport.conftest import eventually

INITIAL_WINDOW = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/t/Call"),
    (":authority", "x"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def message(content):
    return b"\0" + len(content).to_bytes(4, "big") + content


class Client:
    """The h2 library on a socket. Window updates are sent only when asked for."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.events = []
        self.data = {}

    @classmethod
    async def open(cls, server, *, settings=None):
        self = cls(*await connect_raw(server))
        self.h2.initiate_connection()
        self.h2.update_settings(settings or {INITIAL_WINDOW: 65535})
        await self.until(lambda: sum(isinstance(e, h2.events.SettingsAcknowledged) for e in self.events) == 2)
        return self

    def flush(self):
        self.writer.write(self.h2.data_to_send())

    def request(self, *contents, end=False, headers=HEADERS):
        sid = self.h2.get_next_available_stream_id()
        self.h2.send_headers(sid, headers)
        for content in contents:
            self.h2.send_data(sid, message(content))
        if end:
            self.h2.end_stream(sid)
        self.flush()
        return sid

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.flush()
                octets = await self.reader.read(65536)
                if not octets:
                    raise ConnectionResetError
                for event in self.h2.receive_data(octets):
                    self.events.append(event)
                    if isinstance(event, h2.events.DataReceived):
                        self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
            self.flush()

    async def hears(self, kind, sid):
        def found():
            return [e for e in self.events if isinstance(e, kind) and getattr(e, "stream_id", None) == sid]

        await self.until(found)
        return found()[0]

    async def settled(self):
        """Everything the server had to say to what was sent has arrived."""
        self.events.clear()
        self.h2.ping(b"settled?")
        await self.until(lambda: any(isinstance(e, h2.events.PingAckReceived) for e in self.events))

    async def close(self):
        await hang_up(self.writer)


async def connect_raw(server, **options):
    host, port = server.address.rsplit(":", 1)
    return await asyncio.open_connection(host, int(port), **options)


async def hang_up(writer):
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@pytest.fixture
async def client(start):
    clients = []

    async def client(server=None, *, settings=None, **options):
        clients.append(await Client.open(server or await start("h2", **options), settings=settings))
        return clients[-1]

    yield client
    for one in clients:
        await one.close()


async def test_replies_wait_for_the_streams_window(client):
    one = await client(settings={INITIAL_WINDOW: 10})
    sid = one.request(b"size 100", b"size 3", end=True)
    await one.settled()
    assert len(one.data[sid]) == 10
    one.h2.increment_flow_control_window(1, sid)
    await one.settled()
    assert len(one.data[sid]) == 11
    one.h2.increment_flow_control_window(1000, sid)
    await one.hears(h2.events.StreamEnded, sid)
    assert one.data[sid] == message(b"r" * 100) + message(b"rrr")


async def test_a_window_that_shrinks_below_zero_is_filled_before_more_is_sent(client):
    one = await client(settings={INITIAL_WINDOW: 1000})
    sid = one.request(b"size 995")  # the window is used up
    await one.until(lambda: len(one.data.get(sid, b"")) == 1000)
    one.h2.update_settings({INITIAL_WINDOW: 100})  # now it is at -900
    one.h2.send_data(sid, message(b"size 45"))
    await one.settled()
    one.h2.increment_flow_control_window(900, sid)
    await one.settled()
    assert len(one.data[sid]) == 1000
    one.h2.increment_flow_control_window(30, sid)
    await one.settled()
    assert len(one.data[sid]) == 1030
    one.h2.update_settings({INITIAL_WINDOW: 120})
    await one.settled()
    assert len(one.data[sid]) == 1050


async def test_replies_wait_for_the_connections_window_and_share_it(client):
    one = await client(settings={INITIAL_WINDOW: 1 << 20})
    sids = [one.request(b"size 300000", end=True) for _ in range(4)]
    await one.settled()
    assert sum(map(len, one.data.values())) == 65535
    for _ in range(60):
        one.h2.increment_flow_control_window(30_000)
        await one.settled()
    assert [len(one.data[sid]) for sid in sids] == [300_005] * 4


async def test_a_blocked_stream_does_not_hold_up_the_others(client):
    one = await client(settings={INITIAL_WINDOW: 0})
    blocked = one.request(b"size 5")
    await one.settled()
    free = one.request(b"size 7", end=True)
    one.h2.increment_flow_control_window(100, free)
    await one.hears(h2.events.StreamEnded, free)
    assert blocked not in one.data


async def test_frames_are_no_larger_than_the_peer_allows(client):
    one = await client(settings={INITIAL_WINDOW: 1 << 20, h2.settings.SettingCodes.MAX_FRAME_SIZE: 20_000})
    one.h2.increment_flow_control_window(1 << 20)
    sid = one.request(b"size 100000", end=True)
    await one.hears(h2.events.StreamEnded, sid)
    sizes = [len(e.data) for e in one.events if isinstance(e, h2.events.DataReceived)]
    assert max(sizes) == 20_000
    assert sum(sizes) == 100_005


async def test_a_stream_reset_while_blocked_is_forgotten(client, book):
    one = await client(settings={INITIAL_WINDOW: 3})
    sid = one.request(b"size 1000", end=True)
    await one.settled()
    assert book[0].ends == []  # its trailers have not gone out
    one.h2.reset_stream(sid, ErrorCode.CANCEL)
    await one.settled()
    assert book[0].ends == [CloseReason.RESET]


async def test_uploads_are_granted_windows_as_they_flow(client, book):
    one = await client()
    sid = one.request()
    body = message(b"m" * (40 << 20))
    at = 0
    while at < len(body):
        room = min(one.h2.local_flow_control_window(sid), 16384, len(body) - at)
        if room:
            one.h2.send_data(sid, body[at : at + room])
            at += room
            if at % (1 << 20) < 16384:
                one.flush()
                await one.writer.drain()
        else:
            before = len(one.events)
            await one.until(lambda before=before: len(one.events) > before)
    one.flush()
    await eventually(lambda: book[0].messages)
    assert book[0].messages == [b"m" * (40 << 20)]


async def test_a_peer_that_takes_no_replies_is_granted_no_more_room(client, book):
    one = await client()
    sid = one.request()
    sent = 0
    while one.h2.local_flow_control_window(sid) >= 16384:
        one.h2.send_data(sid, message(b"e" * 16379))
        sent += 1
        if sent % 64 == 0:
            await one.settled()
    await one.settled()
    assert one.h2.local_flow_control_window(sid) < 16384
    assert sent * 16384 <= 1 << 24
    assert book[0].ends == []
    one.h2.increment_flow_control_window(1 << 26)
    one.h2.increment_flow_control_window(1 << 26, sid)
    await one.until(lambda: len(one.data[sid]) == sent * 16384)
    await one.settled()
    assert one.h2.local_flow_control_window(sid) > 1 << 23


async def test_padding_and_priority_are_read_past(client):
    one = await client()
    sid = one.h2.get_next_available_stream_id()
    one.h2.send_headers(sid, HEADERS, priority_weight=7, priority_depends_on=0)
    one.h2.prioritize(sid, weight=9)
    one.h2.send_data(sid, message(b"padded"), pad_length=200)
    one.h2.send_data(sid, message(b"in two")[:3], pad_length=0)
    one.h2.send_data(sid, message(b"in two")[3:], end_stream=True)
    await one.hears(h2.events.StreamEnded, sid)
    assert one.data[sid] == message(b"padded") + message(b"in two")


async def test_many_messages_in_one_frame_and_one_in_many(client):
    one = await client()
    sid = one.request()
    whole = b"".join(message(b"%d" % number * 3) for number in range(50))
    one.h2.send_data(sid, whole[:200])
    for at in range(200, len(whole)):
        one.h2.send_data(sid, whole[at : at + 1])
    one.h2.end_stream(sid)
    await one.hears(h2.events.StreamEnded, sid)
    assert one.data[sid] == whole


async def test_headers_are_known_again_and_other_methods_answered(client):
    one = await client()
    for _ in range(3):
        sid = one.request(b"x", end=True)
        await one.hears(h2.events.StreamEnded, sid)
        assert one.data[sid] == message(b"x")
    get = [(":method", "GET"), *HEADERS[1:4]]
    for headers, status in ((get, b"405"), ([*HEADERS[:4], ("content-type", "text/plain")], b"415")):
        sid = one.request(end=True, headers=headers)
        response = await one.hears(h2.events.ResponseReceived, sid)
        assert dict(response.headers)[b":status"] == status
        await one.hears(h2.events.StreamEnded, sid)


async def test_a_request_that_ends_within_a_message_is_an_error(client, book):
    one = await client()
    sid = one.request()
    one.h2.send_data(sid, message(b"cut")[:-1], end_stream=True)
    response = await one.hears(h2.events.ResponseReceived, sid)
    assert dict(response.headers)[b"grpc-status"] == b"13"
    assert book[0].ends == [CloseReason.ERROR]


async def test_a_compressed_message_is_refused(client, book):
    one = await client()
    sid = one.request()
    one.h2.send_data(sid, b"\1\0\0\0\1z")
    response = await one.hears(h2.events.ResponseReceived, sid)
    assert dict(response.headers)[b"grpc-status"] == b"12"


async def test_streams_over_the_limit_are_refused_and_room_is_made_again(client, book):
    one = await client(max_concurrent_streams=2)
    one.h2.remote_settings.update({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 100})
    one.h2.remote_settings.acknowledge()
    first, second, third = (one.request(b"x") for _ in range(3))
    refused = await one.hears(h2.events.StreamReset, third)
    assert refused.error_code == ErrorCode.REFUSED_STREAM
    one.h2.reset_stream(first)
    fourth = one.request(b"y", end=True)
    await one.hears(h2.events.StreamEnded, fourth)
    assert second in one.data


async def begun(server, text):
    """A connection whose stream 1 has said `text`, heard its answer, and is open."""
    reader, writer = await connect_raw(server)
    writer.write(OPENING + frame(1, 4, 1, PATH) + frame(0, 0, 1, message(text)))
    await reader.readuntil(message(text))
    return reader, writer


async def test_drain_promises_only_what_it_serves(start, book):
    server = await start("h2")
    reader, writer = await begun(server, b"a")
    draining = asyncio.ensure_future(server.drain(60))
    assert await reader.readuntil(b"draining") == goaway((1 << 31) - 1, ErrorCode.NO_ERROR) + frame(
        6, 0, 0, b"draining"
    )
    # Opened before the peer heard of it: served. Opened after the promise: not.
    writer.write(frame(1, 5, 3, PATH) + frame(6, 1, 0, b"draining") + frame(1, 5, 5, PATH))
    heard = await reader.readuntil(goaway(3, ErrorCode.NO_ERROR))
    assert heard.count(b"grpc-status\x010") == 1
    assert not draining.done()
    writer.write(frame(3, 0, 1, b"\0\0\0\x08"))
    await asyncio.wait_for(draining, 60)
    assert [call.ends for call in book] == [[CloseReason.RESET], [CloseReason.DONE]]
    await hang_up(writer)


async def test_a_peer_that_still_talks_hears_the_end_of_its_streams_before_the_connection_closes(start, book):
    """A socket that is closed while its peer writes to it is reset, and what was said last is lost."""
    server = await start("h2")
    reader, writer = await begun(server, b"may go")
    draining = asyncio.ensure_future(server.drain(0.05))
    await reader.readuntil(b"draining")
    writer.write(frame(6, 1, 0, b"draining"))
    await reader.readuntil(b"grpc-status\x010")
    await reader.readuntil(b"all said")
    # It was held up meanwhile, and talks on without having read that.
    writer.write(frame(0, 0, 1, message(b"under way")) + frame(6, 0, 0, b"8 octets"))
    await reader.readuntil(b"8 octets")
    assert not draining.done()
    writer.write(frame(6, 1, 0, b"all said"))
    await draining
    assert await reader.read() == b""
    assert book[0].ends == [CloseReason.DONE]
    await hang_up(writer)


async def test_an_idle_connection_is_drained_at_once(start):
    server = await start("h2")
    reader, writer = await connect_raw(server)
    writer.write(OPENING)
    await reader.readexactly(9)
    draining = asyncio.ensure_future(server.drain(60))
    await reader.readuntil(b"draining")
    writer.write(frame(6, 1, 0, b"draining"))
    await asyncio.wait_for(draining, 60)
    assert (await reader.read()).endswith(goaway(0, ErrorCode.NO_ERROR))
    await hang_up(writer)


# --- peers that mean no good ---


async def raw(server, octets):
    """Send octets; hear until the server hangs up, or a while without a word has passed."""
    reader, writer = await connect_raw(server)
    heard = b""
    try:
        writer.write(octets)
        while True:
            piece = await asyncio.wait_for(reader.read(1 << 16), 60)
            if not piece:
                break
            heard += piece
    except ConnectionResetError:
        pass
    finally:
        await hang_up(writer)
    return heard


def goaway_code(heard):
    at, code = 0, None
    while at + 9 <= len(heard):
        size = int.from_bytes(heard[at : at + 3], "big")
        if heard[at + 3] == 7:
            code = int.from_bytes(heard[at + 13 : at + 17], "big")
        at += 9 + size
    return code


OPENING = PREFACE + frame(4, 0, 0) + frame(4, 1, 0)
PATH = b"\x83\x86\x44\x07/t/Call\x0f\x10\x10application/grpc"


def streams(count, each):
    return b"".join(each(sid) for sid in range(1, 2 * count, 2))


@pytest.mark.parametrize(
    ("octets", "code"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", ErrorCode.PROTOCOL_ERROR, id="HTTP/1"),
        pytest.param(PREFACE + frame(6, 0, 0, b"8 octets"), ErrorCode.PROTOCOL_ERROR, id="no settings"),
        pytest.param(
            OPENING + streams(3000, lambda sid: frame(1, 4, sid, PATH) + frame(3, 0, sid, b"\0\0\0\x08")),
            ErrorCode.ENHANCE_YOUR_CALM,
            id="rapid reset",
        ),
        pytest.param(
            OPENING + streams(3000, lambda sid: frame(1, 4, sid, PATH) + frame(8, 0, sid, b"\0\0\0\0")),
            ErrorCode.ENHANCE_YOUR_CALM,
            id="made to reset",
        ),
        pytest.param(OPENING + frame(6, 0, 0, b"8 octets") * 30_000, ErrorCode.ENHANCE_YOUR_CALM, id="flood of pings"),
        pytest.param(
            OPENING + frame(4, 0, 0, b"\0\3\0\0\0\1") * 30_000, ErrorCode.ENHANCE_YOUR_CALM, id="flood of settings"
        ),
        pytest.param(
            OPENING + frame(1, 4, 1, PATH) + frame(0, 0, 1) * 30_000, ErrorCode.ENHANCE_YOUR_CALM, id="empty data"
        ),
        pytest.param(
            OPENING + frame(1, 0, 1, PATH) + frame(9, 0, 1) * 100, ErrorCode.ENHANCE_YOUR_CALM, id="continuation flood"
        ),
        pytest.param(
            OPENING + frame(1, 0, 1, PATH) + frame(9, 0, 1, b"\x00\x01a\x01b" * 3000) * 20,
            ErrorCode.ENHANCE_YOUR_CALM,
            id="endless headers",
        ),
        pytest.param(OPENING + b"\xff" * 100, ErrorCode.FRAME_SIZE_ERROR, id="noise"),
    ],
)
async def test_abuse_ends_the_connection_and_no_other(start, client, octets, code):
    server = await start("h2")
    good = await client(server)
    sid = good.request(b"one")
    await good.settled()
    heard = await raw(server, octets)
    assert goaway_code(heard) == code
    good.h2.send_data(sid, message(b"two"), end_stream=True)
    await good.hears(h2.events.StreamEnded, sid)
    assert good.data[sid] == message(b"one") + message(b"two")


async def test_a_hundred_thousand_headers_cost_little(start, book):
    server = await start("h2")
    block = PATH + b"\x82" * 16_000  # a small frame, but close to a megabyte when unfolded
    started_s = time.process_time()  # others' load is none of its
    heard = await raw(server, OPENING + b"".join(frame(1, 5, sid, block) for sid in range(1, 13, 2)) + b"\xff" * 9)
    assert heard.count(b"grpc-status\x018") == 6
    assert time.process_time() - started_s < 2
    assert book == []


async def test_resets_in_envoys_way_are_no_abuse(start, client, book):
    server = await start("h2")

    def exchange(sid):
        return frame(1, 4, sid, PATH) + frame(0, 0, sid, message(b"hi")) + frame(3, 0, sid, b"\0\0\0\x08")

    heard = await raw(server, OPENING + streams(5000, exchange) + b"\xff" * 9)
    assert goaway_code(heard) == ErrorCode.FRAME_SIZE_ERROR
    assert len(book) == 5000
    assert all(call.ends == [CloseReason.RESET] for call in book)


async def test_a_peer_that_says_nothing_is_dropped(start):
    server = await start("h2", limits=Limits(handshake_timeout_s=0.05))
    assert goaway_code(await raw(server, PREFACE[:10])) is None


async def test_a_peer_that_never_reads_is_not_read_from_and_dropped(start, book):
    server = await start("h2", limits=Limits(stalled_write_timeout_s=0.3))
    _, writer = await connect_raw(server, limit=1024)
    writer.transport.pause_reading()
    widen = frame(8, 0, 0, (1 << 30).to_bytes(4, "big"))
    open_wide = PREFACE + frame(4, 0, 0, b"\0\4\x7f\0\0\0") + frame(4, 1, 0) + widen
    writer.write(open_wide + frame(1, 4, 1, PATH) + frame(0, 0, 1, message(b"size 100000")) * 20_000)
    await eventually(lambda: book and book[0].ends)
    assert book[0].ends == [CloseReason.LOST]
    assert len(book[0].messages) < 2000  # of 20 000: reading stopped with the first full buffers
    await hang_up(writer)


async def test_pushes_to_a_peer_that_never_reads_do_not_fill_memory(start, book):
    server = await start("h2", limits=Limits(max_message_bytes=1 << 20))
    _, writer = await connect_raw(server, limit=1024)
    writer.transport.pause_reading()
    widen = frame(8, 0, 0, (1 << 30).to_bytes(4, "big"))
    writer.write(PREFACE + frame(4, 0, 0, b"\0\4\x7f\0\0\0") + frame(4, 1, 0) + widen + frame(1, 4, 1, PATH))
    await eventually(lambda: book)
    sent = 0
    while not book[0].ends and sent < 1 << 30:
        book[0].stream.send(b"p" * 16_000)
        sent += 16_000
        await asyncio.sleep(0)
    assert sent < 64 << 20
    await hang_up(writer)


async def test_held_messages_in_parts_are_bounded(start):
    server = await start("h2", limits=Limits(max_message_bytes=1 << 20, max_held_messages=2))
    part = b"\0\0\x10\0\0" + b"p" * 16_000
    octets = streams(
        40, lambda sid: frame(1, 4, sid, PATH) + frame(0, 0, sid, part) + frame(0, 0, sid, b"p" * 16_000) * 5
    )
    heard = await raw(server, OPENING + octets + b"\xff" * 9)
    refused = heard.count(b"grpc-status\x018")
    assert 0 < refused < 40


def test_the_same_on_uvloop():
    async def main():
        from extproc.transport.h2 import serve
        from tests.transport.conftest import Recorded

        book = []
        server = await serve({"/t/Call": lambda stream: Recorded(book, stream)}, "127.0.0.1:0")
        one = await Client.open(server)
        sid = one.request(b"hi", end=True)
        await one.hears(h2.events.StreamEnded, sid)
        assert one.data[sid] == message(b"hi")
        await one.close()
        await server.close()

    uvloop.run(main())
