"""One gRPC stream of an HTTP/2 connection: the handle that a call is given, and the stream's own bookkeeping.

Most streams of Envoy live on a few small messages, each whole in one DATA frame and answered in one; they need the
seven slots of `H2Stream` only. What goes beyond (a message in parts, output held back by flow control, a half-closed
stream that still has something to say) is kept in a `Backlog`, made when needed and dropped when empty.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.transport.core import Call
    from extproc.transport.output import Output


class Backlog:
    __slots__ = (
        "content_length",
        "half_closed",
        "http_error",
        "missing_bytes",
        "output",
        "output_bytes",
        "parts",
        "parts_bytes",
        "prefix",
        "trailers",
    )

    def __init__(self) -> None:
        self.prefix = b""
        """first octets of a message's prefix; empty once the prefix is read"""
        self.missing_bytes = -1
        """how much of the current message is still to come; -1 between messages"""
        self.parts: list[bytes] = []
        self.parts_bytes = 0
        self.output: deque[memoryview] = deque()
        """messages with their prefixes, to be cut into DATA frames as the windows allow"""
        self.output_bytes = 0
        self.trailers: bytes | None = None
        """header block to end the stream with once `output` is gone; empty: end with the last DATA frame"""
        self.half_closed = False
        self.content_length: int | None = None
        """bytes still expected of a request that announced its size"""
        self.http_error = 0
        """what to answer once the request, which is not gRPC, has ended"""

    @property
    def idle(self) -> bool:
        return not (
            self.prefix
            or self.missing_bytes >= 0
            or self.output
            or self.half_closed
            or self.http_error
            or self.content_length is not None
        )


class H2Stream:
    """`core.Stream` on HTTP/2. Calls on a closed stream do nothing."""

    __slots__ = ("backlog", "call", "connection", "received_bytes", "send_window", "sid", "started", "waiting")

    def __init__(self, connection: Output, sid: int, send_window: int) -> None:
        self.connection: Output | None = connection
        """None once the stream is closed"""
        self.sid = sid
        self.send_window = send_window
        self.received_bytes = 0
        """since the last WINDOW_UPDATE for this stream"""
        self.call: Call | None = None
        """None before it is made and once it was told the end, which happens once"""
        self.started = False
        """our response headers are sent"""
        self.backlog: Backlog | None = None
        self.waiting = False
        """one of its messages is read, but not yet given to the call"""

    def send(self, message: bytes) -> None:
        connection = self.connection
        if connection is not None and self.call is not None:
            connection.send(self, message)
            connection.flush_soon()

    def finish(self, grpc_status: int = 0, message: str = "") -> None:
        connection = self.connection
        if connection is not None and self.call is not None:
            connection.finish(self, grpc_status, message)
            connection.flush_soon()
