"""Connection: HTTP/1.1 for one client, in as few steps as Python allows.

httptools parses; requests of one connection are answered in order (pipelining), one at a time. A FIN from the client
counts as leaving, as it does for real engines: the request in progress is told at once. Bounds: header bytes, body
bytes, pipelined requests held. Whatever cannot be parsed gets 400 and a close.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools

_LOG = logging.getLogger(__name__)
_MAX_HEAD_BYTES = 256 * 1024
_MAX_PIPELINED = 32
_LINGER_S = 1.0
_RESET = struct.pack("ii", 1, 0)
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_JSON = b"application/json"

Handler = Callable[["Exchange"], None]


class Dates:
    """The date header's value, made once a second."""

    __slots__ = ("_second", "value")

    def __init__(self) -> None:
        self._second = 0
        self.value = b""

    def now(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self.value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second)).encode()
        return self.value


class Exchange:
    """One request and the way to answer it: `reply` once, or `begin`, `write`…, `end`."""

    __slots__ = (
        "_by_name",
        "_connection",
        "body",
        "ended",
        "headers",
        "http10",
        "keep_alive",
        "method",
        "on_lost",
        "target",
    )

    def __init__(
        self,
        connection: "Connection",
        method: bytes,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        keep_alive: bool,
        http10: bool,
    ) -> None:
        self._connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        """names in lower case, in order"""
        self.body = body
        self.keep_alive = keep_alive
        self.http10 = http10
        self._by_name = dict(headers)
        self.ended = False
        self.on_lost: Callable[[], None] | None = None
        """called once if the client leaves before the end"""

    def header(self, name: bytes) -> bytes | None:
        """A header's value (the last one), by its lower-case name."""
        return self._by_name.get(name)

    def reply(self, status: int, body: bytes, content_type: bytes = _JSON, extra: bytes = b"") -> None:
        """A whole response. `extra`: further header lines, each ending in CRLF."""
        self.write(self.head(status, content_type, b"content-length: %d\r\n%s" % (len(body), extra)) + body)
        self.end()

    def head(self, status: int, content_type: bytes, framing: bytes) -> bytes:
        return b"HTTP/1.1 %d %s\r\ndate: %s\r\nserver: uvicorn\r\ncontent-type: %s\r\n%s%s\r\n" % (
            status,
            _REASONS.get(status, b"Unknown"),
            self._connection.dates.now(),
            content_type,
            framing,
            b"" if self.keep_alive else b"connection: close\r\n",
        )

    def write(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport is not None:
            transport.write(data)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._connection.finished(self)

    def close(self) -> None:
        """Close without (further) answer."""
        self.keep_alive = False
        self.end()

    def reset(self) -> None:
        """What was written arrives, then the connection is reset."""
        self.ended = True
        self._connection.reset()


class Connection(asyncio.Protocol):
    """Made per client by the server, which it tells of its life by joining and leaving `peers`."""

    __slots__ = (
        "_active",
        "_body",
        "_body_bytes",
        "_closing",
        "_expects_continue",
        "_handler",
        "_head_bytes",
        "_headers",
        "_idle_timer",
        "_in_head",
        "_keep_alive_s",
        "_last_s",
        "_loop",
        "_max_body_bytes",
        "_mid_request",
        "_parser",
        "_peers",
        "_queue",
        "_refused",
        "_target",
        "dates",
        "transport",
    )

    def __init__(
        self,
        handler: Handler,
        peers: set["Connection"],
        dates: Dates,
        max_body_bytes: int,
        keep_alive_s: float,
    ) -> None:
        self._handler = handler
        self._peers = peers
        self._loop = asyncio.get_running_loop()
        self._max_body_bytes = max_body_bytes
        self._keep_alive_s = keep_alive_s
        self.dates = dates
        self.transport: Any = None
        self._parser = httptools.HttpRequestParser(self)
        self._active: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._closing = False
        self._refused = 0
        self._mid_request = False
        self._in_head = False
        self._head_bytes = 0
        self._last_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._clear()

    def _clear(self) -> None:
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: bytes | list[bytes] = b""
        self._body_bytes = 0
        self._expects_continue = False

    # Transport's side

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._peers.add(self)
        self._last_s = self._loop.time()
        self._idle_timer = self._loop.call_later(self._keep_alive_s, self._check_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._closing = True
        self._peers.discard(self)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._queue.clear()
        active, self._active = self._active, None
        if active is not None and not active.ended:
            active.ended = True
            if active.on_lost is not None:
                active.on_lost()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._in_head:
            # Counted by reads, not by header: the bound needs no more than that.
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(431)
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._refused or 400)
        except httptools.HttpParserUpgrade:
            self._refuse(400)

    # Parser's side

    def on_message_begin(self) -> None:
        self._mid_request = True
        self._in_head = True
        self._head_bytes = 0

    def on_url(self, target: bytes) -> None:
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value))
        if name == b"content-length":
            if int(value) > self._max_body_bytes:
                self._refused = 413
                raise ValueError
        elif name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._expects_continue and self._active is None:
            self._continue()

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._max_body_bytes:
            self._refused = 413
            raise ValueError
        if not self._body:
            self._body = data
        elif isinstance(self._body, bytes):
            self._body = [self._body, data]
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        parser = self._parser
        body = self._body
        exchange = Exchange(
            self,
            parser.get_method(),
            self._target,
            self._headers,
            body if isinstance(body, bytes) else b"".join(body),
            parser.should_keep_alive(),
            parser.get_http_version() == "1.0",
        )
        self._clear()
        self._mid_request = False
        if self._active is None:
            self._active = exchange
            self._handle(exchange)
        else:
            self._queue.append(exchange)
            if len(self._queue) == _MAX_PIPELINED and self.transport is not None:
                self.transport.pause_reading()

    # Exchange's side

    def finished(self, exchange: Exchange) -> None:
        """The active exchange was answered: close, or go on with the next."""
        if self._active is not exchange:
            return
        self._active = None
        self._last_s = self._loop.time()
        if not exchange.keep_alive:
            self._close()
            return
        if self._queue:
            # From the loop, not from here: a thousand pipelined requests must not be a thousand frames deep.
            self._active = following = self._queue.popleft()
            if len(self._queue) == _MAX_PIPELINED - 1 and self.transport is not None:
                self.transport.resume_reading()
            self._loop.call_soon(self._handle, following)
        elif self._expects_continue and self._mid_request:
            self._continue()

    def reset(self) -> None:
        self._closing = True
        # Leave what was written the time to go out: an abort at once would drop it unsent.
        self._loop.call_later(0.01, self._reset_when_sent, 100)

    def drain(self) -> None:
        """Close as soon as the request in progress is answered."""
        if self._active is None:
            self._close()
        else:
            self._active.keep_alive = False

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _handle(self, exchange: Exchange) -> None:
        if self.transport is None:
            return
        try:
            self._handler(exchange)
        except Exception:
            _LOG.exception("the handler failed")
            exchange.close()

    def _continue(self) -> None:
        self._expects_continue = False
        if self.transport is not None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _close(self) -> None:
        self._closing = True
        if self.transport is not None:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """Answer what cannot be read, and close. A client still sending gets a moment to read the answer."""
        self._closing = True
        if self.transport is None:
            return
        if self._active is not None:
            self.transport.close()
            return
        text = b'{"error":{"message":"%s","type":"Bad Request","param":null,"code":%d}}' % (_REASONS[status], status)
        refusal = Exchange(self, b"", b"", [], b"", keep_alive=False, http10=False)
        self.transport.write(refusal.head(status, _JSON, b"content-length: %d\r\n" % len(text)) + text)
        if status == 413:
            self.transport.write_eof()
            self._loop.call_later(_LINGER_S, self.abort)
        else:
            self.transport.close()

    def _reset_when_sent(self, tries: int) -> None:
        transport = self.transport
        if transport is None:
            return
        if tries and transport.get_write_buffer_size():
            self._loop.call_later(0.01, self._reset_when_sent, tries - 1)
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()

    def _check_idle(self) -> None:
        """One timer per connection, looked at late, instead of one per request."""
        left_s = self._last_s + self._keep_alive_s - self._loop.time()
        if self._active is None and not self._mid_request and left_s <= 0.001:
            self._close()
            return
        again_s = max(left_s, 0.05) if self._active is None else self._keep_alive_s
        self._idle_timer = self._loop.call_later(again_s, self._check_idle)
