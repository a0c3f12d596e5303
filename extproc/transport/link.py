"""The life of one HTTP/2 connection apart from its frames: transport, timeouts, write back-pressure, GOAWAY, the end.

A peer that does not read is not read from, and is dropped if it goes on. Each interval allows a peer a number of
frames that make work and no progress; a peer over it is told ENHANCE_YOUR_CALM.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from extproc.transport.core import CloseReason
from extproc.transport.frames import (
    MAX_WINDOW,
    PING,
    ConnectionFailure,
    ErrorCode,
    frame,
    goaway,
)

if TYPE_CHECKING:
    from extproc.transport.core import Call
    from extproc.transport.register import Register
    from extproc.transport.stream import H2Stream

_log = logging.getLogger(__name__)
_DRAIN_PING: Final = b"draining"
_LAST_PING: Final = b"all said"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may ask of us."""

    max_message_bytes: int = 64 << 20
    max_concurrent_streams: int = 100_000
    max_held_messages: int = 4
    """how many of the largest messages a connection may leave in parts, or unread, at a time"""
    handshake_timeout_s: float = 10.0
    """from connect (after TLS where there is any) to the peer's SETTINGS"""
    stalled_write_timeout_s: float = 60.0
    """how long a peer may leave our output unread"""
    abuse_interval_s: float = 10.0
    max_empty_resets: int = 2_000
    """per interval: streams reset before a message came, by the peer or by us for its errors (rapid reset)"""
    max_idle_frames: int = 20_000
    """per interval: PING, SETTINGS, PRIORITY, empty DATA, unknown frames"""


def log_failure(what: str, error: Exception) -> None:
    """Say where it happened and of which type; an exception's text may hold what must not be logged."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
    _log.error("%s: %s at %s", what, type(error).__name__, where)


class Link:
    """An `asyncio.Protocol` in all but name: a compiled class cannot inherit from it.

    Keeps itself in `register` while it lives.
    """

    __slots__ = (
        "_deadline",
        "_draining",
        "_flush_due",
        "_idle_frames",
        "_interval_end",
        "_last_sid",
        "_limits",
        "_loop",
        "_out",
        "_paused",
        "_reading",
        "_refuse_after",
        "_register",
        "_resets",
        "_streams",
        "_transport",
        "_unheard",
        "ended",
    )

    def __init__(self, limits: Limits, register: Register, loop: asyncio.AbstractEventLoop) -> None:
        self._limits = limits
        self._register = register
        self._loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        """done when the connection is gone"""
        self._transport: asyncio.Transport | None = None
        """None before the connection and once it is closing"""
        self._deadline: asyncio.TimerHandle | None = None
        self._streams: dict[int, H2Stream] = {}
        self._last_sid = -1
        self._refuse_after = MAX_WINDOW
        """the last stream our GOAWAY promised to serve; later ones are ignored"""
        self._draining = False
        self._unheard = False
        """ended streams in this drain whose peer may still talk on them"""
        self._out: list[bytes | memoryview] = []
        self._reading = False
        """inside data_received, which flushes at its end"""
        self._flush_due = False
        self._paused = False
        self._interval_end = 0.0
        self._resets = 0
        self._idle_frames = 0

    # --- called by the transport ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        if self._register.closed or (tls is not None and tls.selected_alpn_protocol() != "h2"):
            self.abort()
            return
        self._register.add(self)
        self._set_deadline(self._limits.handshake_timeout_s)
        self._transport.write(self._greeting())

    def _greeting(self) -> bytes:
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._set_deadline(None)
        self._end_all(CloseReason.LOST)
        self._register.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            # Replies come of what we read: reading on would let a peer that does not read fill our memory.
            self._transport.pause_reading()
            self._set_deadline(self._limits.stalled_write_timeout_s)

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._set_deadline(None)
            self._transport.resume_reading()
            self._drain_output()
            self._flush()

    def _drain_output(self) -> None:
        raise NotImplementedError

    # --- output --------------------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Write what is due at the end of this loop tick, or of the read that is being handled."""
        if not self._reading and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        out = self._out
        if not out:
            return
        transport = self._transport
        if transport is not None:
            transport.write(b"".join(out))
            if self._paused and transport.get_write_buffer_size() > (
                self._limits.max_held_messages * self._limits.max_message_bytes
            ):
                self.abort()  # messages pushed to a peer that does not read
        out.clear()

    # --- the end -------------------------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """Ask the peer for no more streams. What it opened before it heard of it is still served (RFC 9113 6.8)."""
        if not self._draining:
            self._draining = True
            self._out.append(goaway(MAX_WINDOW, ErrorCode.NO_ERROR) + frame(PING, 0, 0, _DRAIN_PING))
            self._flush()

    def _ping_returned(self, payload: bytes) -> None:
        # Now no stream can be on its way that the peer opened without knowing.
        if self._draining and payload == _DRAIN_PING and self._refuse_after == MAX_WINDOW:
            self._refuse_after = max(self._last_sid, 0)
            self._out.append(goaway(self._refuse_after, ErrorCode.NO_ERROR))
            self._close_if_drained()
        elif payload == _LAST_PING and self._draining and not self._streams:
            self._close()

    def _close_if_drained(self) -> None:
        if self._refuse_after == MAX_WINDOW or self._streams:
            return
        if not self._unheard:
            self._close()
        elif self._transport is not None:
            # A socket that is closed while the peer still writes to it is reset, and the ends that we said are lost
            # with it: Envoy would cut every answer. When this comes back, it has read them.
            self._unheard = False
            self._out.append(frame(PING, 0, 0, _LAST_PING))
            self.flush_soon()

    def over(self) -> bool:
        """No stream is open."""
        return not self._streams

    def let_go(self) -> None:
        """End the streams whose peer may go on without them."""
        for stream in list(self._streams.values()):
            if may_go(stream.call):
                stream.finish()

    def shut(self) -> None:
        """Close now; open calls end with LOST."""
        self._end_all(CloseReason.LOST)
        self._out.append(goaway(max(self._last_sid, 0), ErrorCode.NO_ERROR))
        self._close()

    def abort(self) -> None:
        """Close without a word."""
        transport, self._transport = self._transport, None
        self._refuse_after = -1
        if transport is not None:
            transport.abort()

    def _fail(self, code: ErrorCode, reason: str) -> None:
        self._end_all(CloseReason.ERROR)
        self._out.append(goaway(max(self._last_sid, 0), code, reason))
        self._close()

    def _close(self) -> None:
        self._flush()
        transport, self._transport = self._transport, None
        self._refuse_after = -1  # what was read already opens no streams
        if transport is not None:
            self._set_deadline(None)
            self._deadline = self._loop.call_later(1.0, transport.abort)  # a peer that does not read must not keep us
            transport.close()

    def _end_all(self, reason: CloseReason) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.connection = None
            stream.backlog = None
            tell_end(stream, reason)

    # --- limits --------------------------------------------------------------------------------------------------

    def _set_deadline(self, after_s: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if after_s is None else self._loop.call_later(after_s, self.abort)

    def _count_reset(self) -> None:
        self._new_interval()
        self._resets += 1
        if self._resets > self._limits.max_empty_resets:
            raise ConnectionFailure(ErrorCode.ENHANCE_YOUR_CALM, "too many resets")

    def _count_idle_frame(self) -> None:
        self._new_interval()
        self._idle_frames += 1
        if self._idle_frames > self._limits.max_idle_frames:
            raise ConnectionFailure(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that do nothing")

    def _new_interval(self) -> None:
        now = self._loop.time()
        if now >= self._interval_end:
            self._interval_end = now + self._limits.abuse_interval_s
            self._resets = self._idle_frames = 0


def may_go(call: Call | None) -> bool:
    """`on_deadline`; a call that fails is cut, and one that was told its end is not asked."""
    try:
        return call is not None and call.on_deadline()
    except Exception as error:
        log_failure("on_deadline failed", error)
        return False


def tell_end(stream: H2Stream, reason: CloseReason) -> None:
    """`on_close`, once. The call and its stream forget each other: no cycle is left for the collector."""
    call, stream.call = stream.call, None
    if call is not None:
        try:
            call.on_close(reason)
        except Exception as error:
            log_failure("on_close failed", error)
