"""Event streams: SSE over chunked transfer, plain and deliberately broken.

`EventStream` is the fast path: each event one HTTP chunk, as uvicorn sends them, all events of one call one write.
`FaultyEventStream` sends the same events cut, compressed, with CRLF or comments.
"""

import asyncio
import zlib
from collections import deque
from collections.abc import Callable

from simengine.connection import Exchange
from simengine.faults import Faults

_CONTENT_TYPE = b"text/event-stream; charset=utf-8"


class EventStream:
    """`open` once, `send` events, `end` once."""

    __slots__ = ("_chunked", "_exchange")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._chunked = not exchange.http10
        if exchange.http10:
            exchange.keep_alive = False

    def open(self) -> None:
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._exchange.write(self._exchange.head(200, _CONTENT_TYPE, framing))

    def send(self, events: list[bytes]) -> None:
        """Complete events, each with its blank line."""
        if not self._chunked:
            self._exchange.write(b"".join(events))
        elif len(events) == 1:
            self._exchange.write(b"%x\r\n%b\r\n" % (len(events[0]), events[0]))
        elif events:
            self._exchange.write(b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events]))

    def end(self) -> None:
        if self._chunked:
            self._exchange.write(b"0\r\n\r\n")
        self._exchange.end()

    def reset(self) -> None:
        self._exchange.reset()


class FaultyEventStream(EventStream):
    """The same stream through the faults that concern its bytes."""

    __slots__ = ("_cuts", "_faults", "_gzip")

    def __init__(self, exchange: Exchange, faults: Faults) -> None:
        super().__init__(exchange)
        self._faults = faults
        self._gzip = zlib.compressobj(wbits=31) if faults.gzip else None
        self._cuts = CutWriter(self._write_piece, faults)

    def open(self) -> None:
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        if self._gzip is not None:
            framing += b"content-encoding: gzip\r\n"
        self._exchange.write(self._exchange.head(200, _CONTENT_TYPE, framing))

    def send(self, events: list[bytes]) -> None:
        for event in events:
            data = b": keep-alive\n\n" + event if self._faults.comments else event
            if self._faults.crlf:
                data = data.replace(b"\n", b"\r\n")
            if self._gzip is not None:
                data = self._gzip.compress(data) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
            self._cuts.write(data)

    def end(self) -> None:
        if self._gzip is not None:
            self._cuts.write(self._gzip.flush())
        self._cuts.then(super().end)

    def reset(self) -> None:
        self._cuts.then(super().reset)

    def _write_piece(self, piece: bytes) -> None:
        self._exchange.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)


class CutWriter:
    """Pieces of a body, one per turn of the loop, so that each is a segment of its own."""

    __slots__ = ("_after", "_at", "_every", "_loop", "_offset", "_pieces", "_running", "_write")

    def __init__(self, write: Callable[[bytes], None], faults: Faults) -> None:
        self._write = write
        self._every = faults.cut_every_bytes
        self._at = deque(sorted(faults.cut_at))
        self._offset = 0
        self._pieces: deque[bytes] = deque()
        self._after: Callable[[], None] | None = None
        self._running = False
        self._loop = asyncio.get_running_loop()

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._every and not self._at:
            self._offset += len(data)
            if self._pieces:
                self._pieces.append(data)
            else:
                self._write(data)
            return
        begin = 0
        while begin < len(data):
            end = begin + self._every if self._every else len(data)
            while self._at and self._at[0] <= self._offset + begin:
                self._at.popleft()
            if self._at:
                end = min(end, self._at[0] - self._offset)
            self._pieces.append(data[begin:end])
            begin = end
        self._offset += len(data)
        self._run()

    def then(self, call: Callable[[], None]) -> None:
        """Call once everything is written."""
        if self._pieces:
            self._after = call
        else:
            call()

    def _run(self) -> None:
        if not self._running:
            self._running = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._running = False
        self._write(self._pieces.popleft())
        if self._pieces:
            self._run()
        elif self._after is not None:
            self._after()
