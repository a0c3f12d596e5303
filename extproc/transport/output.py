"""What a connection sends on its streams: messages as windows and frame size allow, then trailers (RFC 9113 5.2).

A message that fits goes out at once. One that does not waits in its stream's backlog, and everything the stream says
later waits behind it; streams that wait are served in turn. What waits is bounded: a stream over the size of the
largest message is reset, a connection over a few of those is ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.core import CloseReason, GrpcError
from extproc.transport.frames import (
    DATA,
    DEFAULT_FRAME_LIMIT,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FIRST_DATA,
    FRAME,
    HEADERS,
    MAX_WINDOW,
    NEXT_DATA,
    PREFIX,
    RESPONSE,
    TRAILERS_OK,
    ConnectionFailure,
    ErrorCode,
    frame,
    plain_response,
    reset,
    trailers,
    window_update,
)
from extproc.transport.link import Limits, Link, log_failure, tell_end
from extproc.transport.register import Register
from extproc.transport.stream import Backlog, H2Stream

if TYPE_CHECKING:
    import asyncio

STREAM_WINDOW: Final = 1 << 24
"""what a peer may send on a stream ahead of our WINDOW_UPDATE, in bytes; there is one for each half of it"""
_READ_ON_BYTES: Final = 1 << 20
"""a stream with more output than this waiting is granted no more input"""
_REMEMBERED_RESETS: Final = 1024
_TURN_BYTES: Final = 1 << 18
"""how much a waiting stream sends before the next one's turn"""
_NOT_GRPC: Final = b"gRPC only\n"


class Output(Link):
    __slots__ = (
        "_blocked",
        "_forgotten",
        "_frame_limit",
        "_held_input_bytes",
        "_held_output_bytes",
        "_initial_window",
        "_send_window",
    )

    def __init__(self, limits: Limits, register: Register, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limits, register, loop)
        self._send_window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._frame_limit = DEFAULT_FRAME_LIMIT
        self._blocked: dict[int, H2Stream] = {}
        """streams with output that a window, or a peer that does not read, holds back"""
        self._held_output_bytes = 0
        self._held_input_bytes = 0
        self._forgotten: dict[int, None] = {}
        """streams we ended before the peer did: what it had already sent is ignored"""

    def send(self, stream: H2Stream, message: bytes) -> None:
        size = len(message)
        length = size + 5
        backlog = stream.backlog
        if (
            (backlog is None or (backlog.trailers is None and not backlog.output))
            and length <= stream.send_window
            and length <= self._send_window
            and length <= self._frame_limit
        ):
            stream.send_window -= length
            self._send_window -= length
            if stream.started:
                self._out.append(NEXT_DATA(length >> 8, length & 255, 0, 0, stream.sid, 0, size))
            else:
                stream.started = True
                sid = stream.sid
                self._out.append(
                    FIRST_DATA(0, len(RESPONSE), 1, 4, sid, RESPONSE, length >> 8, length & 255, 0, 0, sid, 0, size)
                )
            self._out.append(message)
        else:
            self._hold(stream, message)

    def _hold(self, stream: H2Stream, message: bytes) -> None:
        backlog = stream.backlog
        if backlog is None:
            backlog = stream.backlog = Backlog()
        if backlog.trailers is not None:
            return  # finished already
        limit = self._limits.max_message_bytes
        if backlog.output_bytes > limit:
            # The peer lets our replies pile up.
            self._reset(stream, ErrorCode.ENHANCE_YOUR_CALM)
            return
        self._start(stream)
        self._enqueue(stream, backlog, PREFIX.pack(0, len(message)) + message)
        self._drain_output()
        if self._held_output_bytes > limit * self._limits.max_held_messages:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, "replies pile up")

    def _enqueue(self, stream: H2Stream, backlog: Backlog, data: bytes) -> None:
        backlog.output.append(memoryview(data))
        backlog.output_bytes += len(data)
        self._held_output_bytes += len(data)
        self._blocked.setdefault(stream.sid, stream)

    def _start(self, stream: H2Stream) -> None:
        if not stream.started:
            stream.started = True
            self._out.append(frame(HEADERS, END_HEADERS, stream.sid, RESPONSE))

    def _drain_output(self) -> None:
        """Send what waits, as far as the windows go."""
        blocked = self._blocked
        turns = len(blocked)
        while turns and not self._paused:
            turns -= 1
            sid, stream = next(iter(blocked.items()))
            del blocked[sid]
            backlog = stream.backlog
            if backlog is None:
                continue
            allowed = min(_TURN_BYTES, backlog.output_bytes, self._send_window, stream.send_window)
            if allowed > 0:
                self._send_waiting(stream, backlog, allowed)
            if backlog.output:
                blocked[sid] = stream
                if allowed == _TURN_BYTES:
                    turns += 1
            if stream.received_bytes > STREAM_WINDOW >> 1:
                self._grant(stream)
            if backlog.output:
                continue
            if backlog.trailers is not None:
                self._end(stream, backlog.trailers, half_closed=backlog.half_closed)
            elif backlog.idle:
                stream.backlog = None

    def _send_waiting(self, stream: H2Stream, backlog: Backlog, allowed: int) -> None:
        out = self._out
        output = backlog.output
        stream.send_window -= allowed
        self._send_window -= allowed
        backlog.output_bytes -= allowed
        self._held_output_bytes -= allowed
        while allowed:
            piece = output[0]
            size = min(len(piece), allowed, self._frame_limit)
            allowed -= size
            last = size == len(piece)
            ends = last and len(output) == 1 and backlog.trailers == b""
            out.append(FRAME.pack(size >> 8, size & 255, DATA, END_STREAM if ends else 0, stream.sid))
            if last:
                out.append(piece)
                output.popleft()
            else:
                out.append(piece[:size])
                output[0] = piece[size:]

    # --- ends of streams -----------------------------------------------------------------------------------------

    def finish(self, stream: H2Stream, grpc_status: int, message: str) -> None:
        """End the stream with a status; `on_close(DONE)` when it has gone out."""
        self._finish(stream, trailers(grpc_status, message) if grpc_status or message else TRAILERS_OK)

    def _finish(self, stream: H2Stream, block: bytes) -> None:
        backlog = stream.backlog
        if backlog is None:
            self._end(stream, block, half_closed=False)
        elif not backlog.output:
            self._end(stream, block, half_closed=backlog.half_closed)
        elif backlog.trailers is None:
            backlog.trailers = block

    def _end(self, stream: H2Stream, block: bytes, *, half_closed: bool) -> None:
        """Send trailers and forget the stream. An empty block: its last DATA frame has said the end."""
        sid = stream.sid
        if block:
            # Without a message before them they are the only HEADERS frame, and say what the first one would.
            whole = block if stream.started else RESPONSE + block
            self._out.append(frame(HEADERS, END_HEADERS | END_STREAM, sid, whole))
        if not half_closed:
            self._out.append(reset(sid, ErrorCode.NO_ERROR))  # RFC 9113 8.1: no more of the request is needed
            self._ignore_rest(sid)
            self._unheard = self._draining
        self._forget(stream)
        tell_end(stream, CloseReason.DONE)
        if self._draining:
            self._close_if_drained()

    def _answer_plainly(self, stream: H2Stream, backlog: Backlog) -> None:
        """To what was no gRPC request, now that it has ended."""
        self._out.append(
            frame(HEADERS, END_HEADERS, stream.sid, plain_response(backlog.http_error, _NOT_GRPC)),
        )
        stream.started = True
        backlog.trailers = b""
        self._enqueue(stream, backlog, _NOT_GRPC)
        self._drain_output()

    def _call_failed(self, stream: H2Stream, error: Exception) -> None:
        """The call raised: its stream ends with the status it chose, or INTERNAL."""
        if isinstance(error, GrpcError):
            block = trailers(error.status, error.message)
        else:
            log_failure("a call failed", error)
            block = trailers(13, "internal error")
        self._end_with_error(stream, block)

    def _end_with_error(self, stream: H2Stream, block: bytes) -> None:
        tell_end(stream, CloseReason.ERROR)
        if stream.connection is not None:
            self._finish(stream, block)

    def _reset(self, stream: H2Stream, code: ErrorCode) -> None:
        """End the stream with RST_STREAM."""
        self._out.append(reset(stream.sid, code))
        self._ignore_rest(stream.sid)
        self._forget(stream)
        tell_end(stream, CloseReason.ERROR)
        if self._draining:
            self._close_if_drained()

    def _refuse(self, stream: H2Stream, code: ErrorCode) -> None:
        """The peer broke the stream's rules. Made to do this again and again, we would work for nothing."""
        self._reset(stream, code)
        self._count_reset()

    def _ignore_rest(self, sid: int) -> None:
        self._forgotten[sid] = None
        if len(self._forgotten) > _REMEMBERED_RESETS:
            del self._forgotten[next(iter(self._forgotten))]

    def _forget(self, stream: H2Stream) -> None:
        stream.connection = None
        self._streams.pop(stream.sid, None)
        backlog = stream.backlog
        if backlog is not None:
            self._drop_backlog(stream, backlog)

    def _drop_backlog(self, stream: H2Stream, backlog: Backlog) -> None:
        stream.backlog = None
        self._blocked.pop(stream.sid, None)
        self._held_output_bytes -= backlog.output_bytes
        self._held_input_bytes -= backlog.parts_bytes

    def _end_all(self, reason: CloseReason) -> None:
        self._blocked.clear()
        self._held_output_bytes = self._held_input_bytes = 0
        super()._end_all(reason)

    # --- windows -------------------------------------------------------------------------------------------------

    def _widen(self, sid: int, stream: H2Stream | None, increment: int) -> None:
        """WINDOW_UPDATE for the connection (stream 0) or a stream that is open, or was."""
        if sid == 0:
            if not increment:
                raise ConnectionFailure(ErrorCode.PROTOCOL_ERROR, "window update of 0")
            self._send_window += increment
            if self._send_window > MAX_WINDOW:
                raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR, "connection window too large")
        elif stream is not None:
            if not increment:
                self._refuse(stream, ErrorCode.PROTOCOL_ERROR)
                return
            stream.send_window += increment
            if stream.send_window > MAX_WINDOW:
                self._refuse(stream, ErrorCode.FLOW_CONTROL_ERROR)
                return
        if self._blocked:
            self._drain_output()

    def _grant(self, stream: H2Stream) -> None:
        """Let the peer send on, unless it lets our replies wait: then it is to wait, too."""
        backlog = stream.backlog
        if stream.connection is not None and (backlog is None or backlog.output_bytes <= _READ_ON_BYTES):
            self._out.append(window_update(stream.sid, stream.received_bytes))
            stream.received_bytes = 0

    def _set_initial_window(self, size: int) -> None:
        # What waits is sent after our acknowledgement, so that the peer can tell which window it was sent under.
        change = size - self._initial_window
        self._initial_window = size
        for stream in self._streams.values():
            stream.send_window += change  # may well become negative (RFC 9113 6.9.2)
            if stream.send_window > MAX_WINDOW:
                raise ConnectionFailure(ErrorCode.FLOW_CONTROL_ERROR, "stream window too large")
