"""Why a stream broke off: Envoy's access log tells, ext_proc does not.

When an answer ends before its end, ext_proc's own stream is reset the same way whether the client left or the engine
died. Envoy's gRPC access log carries the response flags that say which; the bootstrap sends it only for requests that
have any flag, so it costs nothing for all others. A request that broke off waits here for its entry, no longer than
`STEPS` of `STEP_S`, and an entry that came first waits as long for its request. The charge is settled already: only the
ledger row and the engine's health record wait.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from apis.wire.access_log_pb2 import ResponseFlags, StreamAccessLogsMessage
from extproc.transport.core import CloseReason, GrpcError, Stream

log = structlog.get_logger("access_log")

SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"
METHOD: Final = f"/{SERVICE}/StreamAccessLogs"
STEP_S: Final = 1.0
STEPS: Final = 5
"""Envoy sends its entries every 100 ms, a starved one later; without such a log the client is taken to have left. In
steps, since a process that was held up itself finds its timers due before it has read what came meanwhile"""
EARLY_MOST: Final = 1000
EARLY_ID_CHARACTERS: Final = 256
"""an entry may overtake the reset of its request's stream, which comes by another connection: so many are kept, and
no longer than a request would wait. Clients choose their ids; a longer one is not worth the memory"""
_INVALID_ARGUMENT: Final = 3
_UNAVAILABLE: Final = 14

CLIENT_DISCONNECTED: Final = "client_disconnected"
ENGINE_LOST: Final = "engine_lost"
STREAM_TIMEOUT: Final = "stream_timeout"


def reason_of(flags: ResponseFlags) -> str:
    """What ended a request that did not end by itself; empty where the flags do not say."""
    if (
        flags.upstream_remote_reset
        or flags.upstream_connection_termination
        or flags.upstream_connection_failure
        or flags.upstream_protocol_error
    ):
        return ENGINE_LOST
    if flags.stream_idle_timeout or flags.upstream_request_timeout or flags.duration_timeout:
        return STREAM_TIMEOUT
    if flags.downstream_connection_termination or flags.downstream_remote_reset or flags.downstream_protocol_error:
        return CLIENT_DISCONNECTED
    return ""


class Abandoned:
    """Requests whose answer broke off, by x-request-id, until it is known why."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, list[_Waiter]] = defaultdict(list)
        self._early: dict[str, tuple[str, float]] = {}
        """reasons for which nobody waits (yet), and when they came, oldest first"""
        self._streams: set[Stream] = set()

    def wait(self, request_id: str, told: Callable[[str], None]) -> None:
        """`told` is called once with the reason: by an access log entry, or for want of one."""
        reason, came_s = self._early.pop(request_id, ("", 0.0))
        if reason and time.monotonic() - came_s < STEPS * STEP_S:
            told(reason)
            return
        waiter = _Waiter(told)
        self._step(request_id, waiter)
        self._waiting[request_id].append(waiter)

    def tell(self, request_id: str, reason: str) -> None:
        """An entry has come, maybe too early. One without a reason leaves its request to wait for the next."""
        if not reason:
            return
        waiters = self._waiting.get(request_id)
        if not waiters:
            self._keep(request_id, reason)
            return
        waiter = waiters.pop(0)
        if not waiters:
            del self._waiting[request_id]
        waiter.end(reason)

    def _keep(self, request_id: str, reason: str) -> None:
        if len(request_id) > EARLY_ID_CHARACTERS:
            return
        self._early.pop(request_id, None)  # the newest stands last
        self._early[request_id] = (reason, time.monotonic())
        if len(self._early) > EARLY_MOST:
            del self._early[next(iter(self._early))]

    def _step(self, request_id: str, waiter: "_Waiter") -> None:
        waiter.steps_left -= 1
        then = self._step if waiter.steps_left else self._give_up
        waiter.timer = asyncio.get_running_loop().call_later(STEP_S, then, request_id, waiter)

    def _give_up(self, request_id: str, waiter: "_Waiter") -> None:
        waiters = self._waiting[request_id]
        waiters.remove(waiter)
        if not waiters:
            del self._waiting[request_id]
        waiter.end(CLIENT_DISCONNECTED)

    def close(self) -> None:
        """The process ends: nobody waits any longer."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        for waiters in waiting.values():
            for waiter in waiters:
                waiter.end(CLIENT_DISCONNECTED)

    # --- the gRPC service -----------------------------------------------------------------------------------------

    def service(self, stream: Stream) -> "_Entries":
        """One stream of entries per Envoy worker; Envoy keeps it open for ever."""
        self._streams.add(stream)
        return _Entries(self, stream)

    def forget(self, stream: Stream) -> None:
        self._streams.discard(stream)

    def drain(self) -> None:
        """End the log streams, which would otherwise keep a draining server waiting."""
        for stream in list(self._streams):
            stream.finish(_UNAVAILABLE, "draining")


class _Waiter:
    __slots__ = ("_told", "steps_left", "timer")

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self.steps_left = STEPS
        self.timer: asyncio.TimerHandle | None = None

    def end(self, reason: str) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self._told(reason)


class _Entries:
    """The call that takes one Envoy worker's entries."""

    def __init__(self, abandoned: Abandoned, stream: Stream) -> None:
        self._abandoned = abandoned
        self._stream = stream

    def on_message(self, message: bytes) -> bytes | None:
        try:
            entries = StreamAccessLogsMessage.FromString(message).http_logs.log_entry
        except DecodeError:
            raise GrpcError(_INVALID_ARGUMENT, "not an access log message") from None
        for entry in entries:
            self._abandoned.tell(entry.request.request_id, reason_of(entry.common_properties.response_flags))
        return None

    def on_half_close(self) -> None: ...

    def on_deadline(self) -> bool:
        return False

    def on_close(self, reason: CloseReason) -> None:
        self._abandoned.forget(self._stream)
