"""What a connection is asked: header blocks to routes and calls, DATA to messages, and how requests end.

Everything here is off the short way of `Connection.data_received`, which deals with whole messages itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.core import CloseReason
from extproc.transport.frames import (
    DEFAULT_FRAME_LIMIT,
    END_HEADERS,
    END_STREAM,
    MAX_WINDOW,
    PADDED,
    PREFIX,
    PREFIX_BYTES,
    PRIORITIZED,
    TRAILERS_OK,
    ConnectionFailure,
    ErrorCode,
    reset,
    trailers,
)
from extproc.transport.hpack import DynamicTable, HpackError
from extproc.transport.link import Limits, tell_end
from extproc.transport.output import STREAM_WINDOW, Output
from extproc.transport.register import Register
from extproc.transport.routing import MAX_HEADER_BYTES, Malformed, Route, Router, check_trailers
from extproc.transport.stream import Backlog, H2Stream

if TYPE_CHECKING:
    import asyncio

_unpack_prefix = PREFIX.unpack_from

_MAX_FRAGMENTS: Final = 64
_REMEMBERED_GAPS: Final = 16


class Requests(Output):
    """The part of a connection that takes requests."""

    __slots__ = ("_dynamic", "_fragments", "_gaps", "_router", "_routes")

    def __init__(self, router: Router, limits: Limits, register: Register, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limits, register, loop)
        self._router = router
        # Our table size of 0 binds the peer from its acknowledgement on: only then do equal octets mean equal headers.
        self._dynamic: DynamicTable | None = DynamicTable()
        self._routes: dict[bytes, Route] = {}
        self._fragments: tuple[int, int, list[bytes]] | None = None
        """a header block in parts: stream, flags, fragments; only CONTINUATION may follow"""
        self._gaps: list[range] = []
        """stream numbers the peer skipped lately: never used, as opposed to closed"""

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
