"""HTTP/2 server connection for gRPC on asyncio: frames in, calls made and fed (RFC 9113).

One pass over each read, and all its output in one write. The short way through `data_received` is for what Envoy sends:
a HEADERS frame of octets seen before, whole messages, RST_STREAM; everything else goes to a method of its own.

Failure: what breaks the connection's rules ends it with GOAWAY, what breaks a stream's ends that stream, a call that
raises ends its stream with a gRPC status. Nothing escapes `data_received`.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final

from extproc.transport.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_LIMIT,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME,
    FRAME_BYTES,
    GOAWAY,
    HEADERS,
    MAX_WINDOW,
    PING,
    PREFACE,
    PREFIX,
    PREFIX_BYTES,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ENABLE_PUSH,
    SETTINGS_HEADER_TABLE_SIZE,
    SETTINGS_INITIAL_WINDOW_SIZE,
    SETTINGS_MAX_CONCURRENT_STREAMS,
    SETTINGS_MAX_FRAME_SIZE,
    SETTINGS_MAX_HEADER_LIST_SIZE,
    WINDOW_UPDATE,
    ConnectionFailure,
    ErrorCode,
    frame,
    window_update,
)
from extproc.transport.link import Limits, log_failure
from extproc.transport.output import STREAM_WINDOW
from extproc.transport.register import Register
from extproc.transport.requests import Requests
from extproc.transport.routing import MAX_HEADER_BYTES, Router

if TYPE_CHECKING:
    import asyncio

    from extproc.transport.stream import H2Stream

_unpack = FRAME.unpack_from
_kind = operator.itemgetter(0)
_unpack_prefix = PREFIX.unpack_from

_CONNECTION_WINDOW: Final = 1 << 30
_FLUSH_AT: Final = 512
"""pieces of output within one read: small questions may have large answers"""

_BATCH_MOST: Final = 128
"""messages gathered before they are given to their calls"""


class Connection(Requests):
    """One accepted connection."""

    __slots__ = ("_batch", "_buffer", "_greeted", "_quick_limit", "_received_bytes")

    def __init__(self, router: Router, limits: Limits, register: Register, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(router, limits, register, loop)
        self._greeted = False
        self._batch: list[tuple[int, H2Stream, bytes]] = []
        """whole messages of this read, not yet given to their calls"""
        self._buffer = b""
        self._received_bytes = 0
        self._quick_limit = min(DEFAULT_FRAME_LIMIT, limits.max_message_bytes)

    def _greeting(self) -> bytes:
        settings = (
            (SETTINGS_HEADER_TABLE_SIZE, 0),
            (SETTINGS_MAX_CONCURRENT_STREAMS, self._limits.max_concurrent_streams),
            (SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (SETTINGS_MAX_HEADER_LIST_SIZE, MAX_HEADER_BYTES),
        )
        payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings)
        return frame(SETTINGS, 0, 0, payload) + window_update(0, _CONNECTION_WINDOW - DEFAULT_WINDOW)

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        self._reading = True
        pos = 0
        end = len(data)
        streams = self._streams
        routes = self._routes
        out = self._out
        batch = self._batch
        received = 0
        try:
            if not self._greeted:
                pos = self._greet(data)
            while end - pos >= FRAME_BYTES:
                high, low, kind, flags, sid = _unpack(data, pos)
                length = high << 8 | low
                p = pos + FRAME_BYTES
                e = p + length
                if e > end:
                    if length > DEFAULT_FRAME_LIMIT:
                        raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "frame too large")
                    break
                pos = e
                if kind == DATA and self._fragments is None:
                    received += length
                    stream = streams.get(sid)
                    if stream is not None and stream.backlog is None and not flags and length > PREFIX_BYTES:
                        stream.received_bytes += length
                        compressed, size = _unpack_prefix(data, p)
                        if size == length - PREFIX_BYTES and not compressed and length <= self._quick_limit:
                            if stream.waiting:
                                self._dispatch()  # one stream's messages keep their order
                            stream.waiting = True
                            p += PREFIX_BYTES
                            batch.append((data[p], stream, data[p:e]))
                        else:
                            self._dispatch()
                            self._gather(stream, data, p, e)
                        if stream.received_bytes > STREAM_WINDOW >> 1:
                            self._grant(stream)
                        if len(batch) >= _BATCH_MOST:
                            self._dispatch()
                        if len(out) > _FLUSH_AT and not self._breathe():
                            break
                    else:
                        self._dispatch()
                        self._data(flags, sid, data, p, e)
                elif (
                    kind == HEADERS
                    and flags | END_STREAM == END_STREAM | END_HEADERS
                    and (route := routes.get(data[p:e])) is not None
                    and sid == self._last_sid + 2
                    and self._fragments is None
                ):
                    self._last_sid = sid
                    self._open(sid, flags, route)
                elif (
                    kind == RST_STREAM
                    and length == 4
                    and self._fragments is None
                    and (stream := streams.pop(sid, None)) is not None
                ):
                    if stream.waiting:
                        self._dispatch()
                    self._reset_by_peer(stream)
                else:
                    self._dispatch()
                    self._frame(kind, flags, sid, data, p, e)
                    routes = self._routes
            self._dispatch()
        except ConnectionFailure as failure:
            self._dispatch()
            self._fail(failure.code, failure.reason)
            pos = end
        except Exception as error:
            log_failure("a connection failed", error)
            self._fail(ErrorCode.INTERNAL_ERROR, "")
            pos = end
        self._reading = False
        if pos < end:
            self._buffer = data[pos:] if pos else data
        self._received_bytes += received
        if self._received_bytes > _CONNECTION_WINDOW >> 1:
            self._out.append(window_update(0, self._received_bytes))
            self._received_bytes = 0
        if self._out:
            self._flush()

    def _dispatch(self) -> None:
        """Feed the calls what this read has brought them, messages of one kind after the other.

        A message's kind is told by its first octet, its first field's tag. The code that serves a kind stays in the
        processor's caches for the whole of it: with seven messages of each kind in a read, ext_proc's costs a quarter
        less than in the order of arrival, in which Envoy's workers mix the phases of all their requests.
        """
        batch = self._batch
        if len(batch) > 2:
            batch.sort(key=_kind)
        for _, stream, message in batch:
            stream.waiting = False
            call = stream.call
            if call is None:
                continue
            try:
                reply = call.on_message(message)
            except Exception as error:
                self._call_failed(stream, error)
                continue
            if reply is not None and stream.connection is not None:
                self.send(stream, reply)
        batch.clear()

    def _breathe(self) -> bool:
        """Write amid a read; whether the peer takes it, so that reading may go on."""
        self._flush()
        return not self._paused

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._buffer and not self._paused:
            self.data_received(b"")  # what of the last read had to wait

    def _greet(self, data: bytes) -> int:
        """Where frames start; past the end while the preface or the first frame's head is not all there."""
        size = len(PREFACE)
        if data[:size] != PREFACE[: len(data)]:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "not HTTP/2")
        if len(data) < size + FRAME_BYTES:
            self._buffer = data
            return len(data)
        if data[size + 3] != SETTINGS or data[size + 4] & ACK:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "no SETTINGS")
        self._greeted = True
        self._set_deadline(None)
        return size

    def _frame(self, kind: int, flags: int, sid: int, data: bytes, p: int, e: int) -> None:
        """Any frame off the short way, and any of those while a header block is open."""
        length = e - p
        sid &= MAX_WINDOW  # the first bit is reserved and ignored
        if length > DEFAULT_FRAME_LIMIT:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "frame too large")
        if self._fragments is not None and (kind != CONTINUATION or sid != self._fragments[0]):
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "a header block was not finished")
        if kind == HEADERS:
            self._headers(flags, sid, data, p, e)
        elif kind == WINDOW_UPDATE:
            if length != 4:
                raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "window update")
            stream = self._streams.get(sid)
            if stream is None and sid:
                self._require_used(sid)
            self._widen(sid, stream, int.from_bytes(data[p:e], "big") & MAX_WINDOW)
        elif kind == RST_STREAM:
            if length != 4:
                raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "reset")
            self._require_used(sid)
            reset_stream = self._streams.pop(sid, None)
            if reset_stream is not None:
                self._reset_by_peer(reset_stream)
        elif kind == SETTINGS:
            self._settings(flags, sid, data[p:e])
        elif kind == PING:
            if sid:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "ping on a stream")
            if length != 8:
                raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "ping")
            if flags & ACK:
                self._ping_returned(data[p:e])
            else:
                self._out.append(frame(PING, ACK, 0, data[p:e]))
            self._count_idle_frame()
        elif kind == CONTINUATION:
            self._continuation(flags, data[p:e])
        elif kind == PRIORITY:
            if not sid:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "priority of the connection")
            self._count_idle_frame()
            if length != 5 or int.from_bytes(data[p : p + 4], "big") & MAX_WINDOW == sid:
                code = ErrorCode.FRAME_SIZE_ERROR if length != 5 else ErrorCode.PROTOCOL_ERROR
                self._refuse_any(sid, code)
        elif kind == GOAWAY:
            if sid:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
            self._count_idle_frame()  # the peer opens no more streams; those open go on
        elif kind in {DATA, 5}:  # DATA within a header block was refused above; PUSH_PROMISE is not for clients
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "a client cannot push")
        else:
            self._count_idle_frame()

    def _settings(self, flags: int, sid: int, payload: bytes) -> None:
        self._count_idle_frame()
        if sid:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "settings on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "settings")
        if flags & ACK:
            self._dynamic = None
            self._routes = self._router.known
            return
        for at in range(0, len(payload), 6):
            key = int.from_bytes(payload[at : at + 2], "big")
            value = int.from_bytes(payload[at + 2 : at + 6], "big")
            if key == SETTINGS_INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR, "initial window too large")
                self._set_initial_window(value)
            elif key == SETTINGS_MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_LIMIT <= value < 1 << 24:
                    raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "frame limit out of range")
                self._frame_limit = value
            elif key == SETTINGS_ENABLE_PUSH and value > 1:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "push is 0 or 1")
        self._out.append(frame(SETTINGS, ACK, 0))
        if self._blocked:
            self._drain_output()
