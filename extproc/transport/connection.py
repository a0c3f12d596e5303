"""HTTP/2 server connection for gRPC on asyncio: frames in, calls made and fed (RFC 9113).

One pass over each read, and all its output in one write. The short way through `data_received` is for what Envoy sends:
a HEADERS frame of octets seen before, whole messages, RST_STREAM; everything else goes to a method of its own.

Failure: what breaks the connection's rules ends it with GOAWAY, what breaks a stream's ends that stream, a call that
raises ends its stream with a gRPC status. Nothing escapes `data_received`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.core import CloseReason
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
    PADDED,
    PING,
    PREFACE,
    PREFIX,
    PREFIX_BYTES,
    PRIORITIZED,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ENABLE_PUSH,
    SETTINGS_HEADER_TABLE_SIZE,
    SETTINGS_INITIAL_WINDOW_SIZE,
    SETTINGS_MAX_CONCURRENT_STREAMS,
    SETTINGS_MAX_FRAME_SIZE,
    SETTINGS_MAX_HEADER_LIST_SIZE,
    TRAILERS_OK,
    WINDOW_UPDATE,
    ConnectionFailure,
    ErrorCode,
    frame,
    reset,
    trailers,
    window_update,
)
from extproc.transport.hpack import DynamicTable, HpackError
from extproc.transport.link import Limits, Link, log_failure, tell_end
from extproc.transport.output import STREAM_WINDOW, Output
from extproc.transport.routing import MAX_HEADER_BYTES, Malformed, Route, Router, check_trailers
from extproc.transport.stream import Backlog, H2Stream

if TYPE_CHECKING:
    import asyncio
    from collections.abc import MutableSet

_unpack = FRAME.unpack_from
_unpack_prefix = PREFIX.unpack_from

_CONNECTION_WINDOW: Final = 1 << 30
_MAX_FRAGMENTS: Final = 64
_FLUSH_AT: Final = 512
"""pieces of output within one read: small questions may have large answers"""
_REMEMBERED_GAPS: Final = 16


class Connection(Output):
    """One accepted connection."""

    __slots__ = (
        "_buffer",
        "_dynamic",
        "_fragments",
        "_gaps",
        "_greeted",
        "_quick_limit",
        "_received_bytes",
        "_router",
        "_routes",
    )

    def __init__(
        self, router: Router, limits: Limits, register: MutableSet[Link], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(limits, register, loop)
        self._router = router
        # Our table size of 0 binds the peer from its acknowledgement on: only then do equal octets mean equal headers.
        self._dynamic: DynamicTable | None = DynamicTable()
        self._routes: dict[bytes, Route] = {}
        self._greeted = False
        self._buffer = b""
        self._received_bytes = 0
        self._quick_limit = min(DEFAULT_FRAME_LIMIT, limits.max_message_bytes)
        self._fragments: tuple[int, int, list[bytes]] | None = None
        """a header block in parts: stream, flags, fragments; only CONTINUATION may follow"""
        self._gaps: list[range] = []
        """stream numbers the peer skipped lately: never used, as opposed to closed"""

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
                    if stream is not None and stream.backlog is None and flags < 2 and length >= PREFIX_BYTES:
                        stream.received_bytes += length
                        compressed, size = _unpack_prefix(data, p)
                        if size == length - PREFIX_BYTES and not compressed and length <= self._quick_limit:
                            try:
                                reply = stream.call.on_message(data[p + PREFIX_BYTES : e])  # type: ignore[union-attr]
                            except Exception as error:
                                self._call_failed(stream, error)
                                continue
                            if reply is not None and stream.connection is not None:
                                self.send(stream, reply)
                        else:
                            self._gather(stream, data, p, e)
                        if flags:
                            self._end_of_request(stream)
                        elif stream.received_bytes > STREAM_WINDOW >> 1:
                            self._grant(stream)
                        if len(out) > _FLUSH_AT and not self._breathe():
                            break
                    else:
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
                    self._reset_by_peer(stream)
                else:
                    self._frame(kind, flags, sid, data, p, e)
                    routes = self._routes
        except ConnectionFailure as failure:
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

    def _require_used(self, sid: int) -> None:
        if not sid or sid > self._last_sid or not sid & 1:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "frame for an idle stream")

    def _refuse_any(self, sid: int, code: ErrorCode) -> None:
        stream = self._streams.get(sid)
        if stream is not None:
            self._refuse(stream, code)
        else:
            self._out.append(reset(sid, code))
            self._count_reset()

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

    # --- requests ------------------------------------------------------------------------------------------------

    def _headers(self, flags: int, sid: int, data: bytes, p: int, e: int) -> None:
        if not sid & 1:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "headers on a stream that is not a client's")
        if flags & PADDED:
            e = _unpadded(data, p, e)
            p += 1
        self_dependent = False
        if flags & PRIORITIZED:
            if e - p < 5:
                raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "headers")
            self_dependent = int.from_bytes(data[p : p + 4], "big") & MAX_WINDOW == sid
            p += 5
        if flags & END_HEADERS:
            self._header_block(sid, flags, data[p:e])
        else:
            self._fragments = (sid, flags, [data[p:e]])
        if self_dependent:
            self._refuse_any(sid, ErrorCode.PROTOCOL_ERROR)

    def _continuation(self, flags: int, fragment: bytes) -> None:
        if self._fragments is None:
            raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "no header block to continue")
        sid, first_flags, fragments = self._fragments
        fragments.append(fragment)
        if len(fragments) > _MAX_FRAGMENTS or sum(map(len, fragments)) > MAX_HEADER_BYTES:
            raise ConnectionFailure(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        if flags & END_HEADERS:
            self._fragments = None
            self._header_block(sid, first_flags, b"".join(fragments))

    def _header_block(self, sid: int, flags: int, block: bytes) -> None:
        stream = self._streams.get(sid)
        try:
            if stream is not None or sid <= self._last_sid:
                self._trailing_headers(sid, stream, flags, block)
                return
            if sid > self._last_sid + 2:
                self._gaps = [*self._gaps[1 - _REMEMBERED_GAPS :], range(self._last_sid + 2, sid, 2)]
            self._last_sid = sid
            route = self._router.route(block, self._dynamic)
        except HpackError:
            raise ConnectionFailure(ErrorCode.COMPRESSION_ERROR, "header block") from None
        except Malformed:
            self._refuse_any(sid, ErrorCode.PROTOCOL_ERROR)
            self._ignore_rest(sid)
            return
        self._open(sid, flags, route)

    def _trailing_headers(self, sid: int, stream: H2Stream | None, flags: int, block: bytes) -> None:
        malformed = False
        try:
            check_trailers(block, self._dynamic)
        except Malformed:
            malformed = True
        if stream is None:
            if sid in self._forgotten:
                return
            if any(sid in gap for gap in self._gaps):
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "stream number went backwards")
            raise ConnectionFailure(ErrorCode.STREAM_CLOSED, "headers on a closed stream")
        if stream.backlog is not None and stream.backlog.half_closed:
            self._refuse(stream, ErrorCode.STREAM_CLOSED)
        elif malformed or not flags & END_STREAM:
            self._refuse(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            self._end_of_request(stream)

    def _open(self, sid: int, flags: int, route: Route) -> None:
        streams = self._streams
        if sid > self._refuse_after:
            return  # our GOAWAY told the peer that this stream was not served
        if len(streams) >= self._limits.max_concurrent_streams:
            self._out.append(reset(sid, ErrorCode.REFUSED_STREAM))
            self._ignore_rest(sid)
            self._count_reset()
            return
        stream = streams[sid] = H2Stream(self, sid, self._initial_window)
        if route.service is not None:
            if route.content_length is not None:
                stream.backlog = Backlog()
                stream.backlog.content_length = route.content_length
            try:
                stream.call = route.service(stream)
            except Exception as error:
                self._call_failed(stream, error)
                return
        elif route.http_error:
            backlog = stream.backlog = Backlog()
            backlog.http_error = route.http_error
            backlog.content_length = route.content_length
        else:
            grpc_status, message = route.grpc_error or (2, "no route")
            self._end(stream, trailers(grpc_status, message), half_closed=bool(flags & END_STREAM))
            return
        if flags & END_STREAM:
            self._end_of_request(stream)

    def _data(self, flags: int, sid: int, data: bytes, p: int, e: int) -> None:
        """A DATA frame off the short way: padded, empty, or for a stream with a backlog, or for none."""
        length = e - p
        sid &= MAX_WINDOW
        if length > DEFAULT_FRAME_LIMIT:
            raise ConnectionFailure(ErrorCode.FRAME_SIZE_ERROR, "frame too large")
        if flags & PADDED:
            e = _unpadded(data, p, e)
            p += 1
        stream = self._streams.get(sid)
        if stream is None:
            self._require_used(sid)
            if sid not in self._forgotten:
                self._refuse_any(sid, ErrorCode.STREAM_CLOSED)
            return
        stream.received_bytes += length
        backlog = stream.backlog
        if backlog is not None:
            if backlog.half_closed:
                self._refuse(stream, ErrorCode.STREAM_CLOSED)
                return
            if backlog.content_length is not None:
                backlog.content_length -= e - p
        if p == e and not flags & END_STREAM:
            self._count_idle_frame()
        if stream.call is not None:
            self._gather(stream, data, p, e)
        if flags & END_STREAM:
            self._end_of_request(stream)
        elif stream.received_bytes > STREAM_WINDOW >> 1:
            self._grant(stream)

    def _gather(self, stream: H2Stream, data: bytes, p: int, e: int) -> None:
        """Messages that do not come one to a frame: collected in parts, joined once."""
        backlog = stream.backlog
        if backlog is None:
            backlog = stream.backlog = Backlog()
        limit = self._limits.max_message_bytes
        while p < e and stream.call is not None:
            if backlog.missing_bytes < 0:
                take = min(PREFIX_BYTES - len(backlog.prefix), e - p)
                backlog.prefix += data[p : p + take]
                p += take
                if len(backlog.prefix) < PREFIX_BYTES:
                    break
                compressed, size = _unpack_prefix(backlog.prefix)
                if compressed:
                    self._end_with_error(stream, trailers(12, "compressed messages are not supported"))
                    return
                if size > limit:
                    self._end_with_error(stream, trailers(8, f"message larger than {limit} bytes"))
                    return
                backlog.prefix = b""
                backlog.missing_bytes = size
            take = min(backlog.missing_bytes, e - p)
            if take:
                backlog.parts.append(data[p : p + take])
                backlog.missing_bytes -= take
                p += take
            if not backlog.missing_bytes:
                message = b"".join(backlog.parts)
                self._held_input_bytes -= backlog.parts_bytes
                backlog.parts = []
                backlog.parts_bytes = 0
                self._deliver(stream, message)  # missing_bytes stays 0 meanwhile: nobody drops the backlog
                backlog.missing_bytes = -1
            else:
                backlog.parts_bytes += take
                self._held_input_bytes += take
                if self._held_input_bytes > limit * self._limits.max_held_messages:
                    self._end_with_error(stream, trailers(8, "too many messages in parts on one connection"))
                    return
        if stream.backlog is backlog and backlog.idle:
            stream.backlog = None

    def _deliver(self, stream: H2Stream, message: bytes) -> None:
        try:
            reply = stream.call.on_message(message)  # type: ignore[union-attr]
        except Exception as error:
            self._call_failed(stream, error)
            return
        if reply is not None and stream.connection is not None:
            self.send(stream, reply)

    # --- ends of requests ----------------------------------------------------------------------------------------

    def _end_of_request(self, stream: H2Stream) -> None:
        """END_STREAM came, on a stream that may have a backlog."""
        backlog = stream.backlog
        if stream.connection is None:
            return
        if backlog is None:
            self._half_close(stream)
            return
        backlog.half_closed = True
        if backlog.content_length:  # RFC 9113 8.1.1
            self._refuse(stream, ErrorCode.PROTOCOL_ERROR)
        elif backlog.http_error:
            self._answer_plainly(stream, backlog)
        elif backlog.prefix or backlog.missing_bytes >= 0:
            self._end_with_error(stream, trailers(13, "the request ends within a message"))
        else:
            self._half_close(stream)

    def _half_close(self, stream: H2Stream) -> None:
        call = stream.call
        if call is None:
            return
        try:
            stays = call.on_half_close()
        except Exception as error:
            self._call_failed(stream, error)
            return
        if stream.connection is None:
            return
        backlog = stream.backlog
        if stays or backlog is not None:
            if backlog is None:
                backlog = stream.backlog = Backlog()
            backlog.half_closed = True
        if stays:
            return
        if backlog is None:
            self._end(stream, TRAILERS_OK, half_closed=True)
        else:
            self._finish(stream, TRAILERS_OK)

    def _reset_by_peer(self, stream: H2Stream) -> None:
        stream.connection = None
        if stream.backlog is not None:
            self._drop_backlog(stream, stream.backlog)
        tell_end(stream, CloseReason.RESET)
        if self._draining:
            self._close_if_drained()
        if not stream.received_bytes:
            self._count_reset()


def _unpadded(data: bytes, p: int, e: int) -> int:
    """Where a padded frame's content ends; it starts one octet after `p`."""
    if p == e or data[p] >= e - p:
        raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
    return e - data[p]
