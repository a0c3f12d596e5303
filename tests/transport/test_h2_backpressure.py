"""A peer that stops reading and goes on later gets everything, in order."""

import asyncio

import pytest

from extproc.transport.connection import Connection
from extproc.transport.frames import frame
from extproc.transport.link import Limits
from extproc.transport.register import Register
from extproc.transport.routing import Router
from tests.transport.conftest import Recorded
from tests.transport.memory_wire import Wire
from tests.transport.test_h2_wire import OPENING, PATH, message

WIDE = frame(4, 0, 0, b"\0\4\x7f\0\0\0") + frame(8, 0, 0, (1 << 30).to_bytes(4, "big"))


@pytest.fixture
async def wire(book):
    """A connection with one stream open, wide windows, and a peer that does not read."""
    router = Router({"/t/Call": lambda stream: Recorded(book, stream)})
    wire = Wire()
    wire.protocol = Connection(router, Limits(), Register(), asyncio.get_running_loop())
    wire.protocol.connection_made(wire)
    wire.protocol.data_received(OPENING + WIDE + frame(1, 4, 1, PATH))
    wire.room = False
    yield wire
    wire.closed = True
    wire.protocol.connection_lost(None)


def go_on(wire):
    wire.written = b""
    wire.room = True
    wire.protocol.resume_writing()


def said(written):
    """The octets of all DATA frames."""
    at, data = 0, b""
    while at < len(written):
        size = int.from_bytes(written[at : at + 3], "big")
        if written[at + 3] == 0:
            data += written[at + 9 : at + 9 + size]
        at += 9 + size
    return data


async def test_a_small_reply_does_not_overtake_a_large_one(wire, book):
    stream = book[0].stream
    stream.send(b"first")
    await asyncio.sleep(0)
    assert not wire.reading
    stream.send(b"A" * 40_000)
    stream.send(b"b")
    await asyncio.sleep(0)
    go_on(wire)
    await asyncio.sleep(0)
    assert said(wire.written) == message(b"A" * 40_000) + message(b"b")


async def test_what_was_read_before_the_stop_is_served_after_it(wire, book):
    wire.protocol.data_received(frame(0, 0, 1, message(b"size 16000")) * 1000 + frame(0, 0, 1, message(b"cut"))[:12])
    served = len(book[0].messages)
    assert served < 500
    assert not wire.reading
    for _ in range(10):
        go_on(wire)
        assert said(wire.written) == message(b"r" * 16_000) * (len(book[0].messages) - served)
        served = len(book[0].messages)
    assert served == 1000
    wire.protocol.data_received(frame(0, 0, 1, message(b"cut"))[12:])
    assert book[0].messages[-1] == b"cut"
