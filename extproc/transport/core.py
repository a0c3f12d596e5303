"""The seam between a gRPC server end and what it serves: one call per stream, bytes in, bytes out.

A server (`h2`, `grpc_aio`) makes one `Call` per gRPC stream through the `Service` registered for its `:path`, feeds it
each message as it arrives, in order, on the event loop, and tells it exactly once how the stream ended.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

LET_GO_S: Final = 2.0
"""after a drain's timeout: how long calls are asked whether their peers may go on without them"""
LET_GO_EVERY_S: Final = 0.02
HEAR_S: Final = 5.0
"""and then: how long a peer may take to read that its streams have ended"""


class CloseReason(enum.Enum):
    DONE = "done"
    """both sides finished: the peer half-closed, or `Stream.finish` was called, and trailers were sent"""
    RESET = "reset"
    """the peer reset the stream. With Envoy this is also the ordinary end, never a proof that a client left"""
    LOST = "lost"
    """the connection went away"""
    ERROR = "error"
    """we ended it: a broken frame, a message over the size limit, a handler that raised"""


class Stream(Protocol):
    """The server's handle on one open stream. Calls on a closed stream do nothing."""

    def send(self, message: bytes) -> None:
        """Send one message later than its request's `on_message`. Writes of one loop tick leave together."""

    def finish(self, grpc_status: int = 0, message: str = "") -> None:
        """Send trailers and end the stream; `on_close(DONE)` follows."""


class Call(Protocol):
    """What serves one stream. `on_message` and `on_close` never block; an exception ends the stream with status 13."""

    def on_message(self, message: bytes) -> bytes | None:
        """One whole gRPC message. Returns the reply, or None where the reply comes later or never.

        Raise `GrpcError(status, message)` to end the stream with a status of choice.
        """

    def on_half_close(self) -> bool | None:
        """The peer will send no more. The server sends trailers (OK) right after this returns, unless it returns
        True: then the call goes on sending until `Stream.finish`, as the answer to a single request does.
        """

    def on_deadline(self) -> bool:
        """The drain's time is up and the stream is still open. True: it ends now, with OK, and the peer goes on without
        it; False: it goes on for another moment, is asked again, and is cut at last.
        """

    def on_close(self, reason: CloseReason) -> None:
        """The stream is over. Called exactly once, also after an exception."""


Service: TypeAlias = Callable[[Stream], Call]
Services: TypeAlias = Mapping[str, Service]
"""`:path`, such as /envoy.service.ext_proc.v3.ExternalProcessor/Process, to the maker of its calls"""


class GrpcError(Exception):
    """Ends a stream with `status` (a gRPC code) and `message`, which goes over the wire: no secrets in it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Server(Protocol):
    """A listening server end."""

    address: str
    """HOST:PORT (the real port where 0 was asked for) or unix:PATH"""

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, tell peers (GOAWAY), wait until open streams end, at most `timeout_s`.

        Then calls may let go of their streams (`Call.on_deadline`), for LET_GO_S at most.
        """

    async def close(self) -> None:
        """Close everything now; every open call gets `on_close(LOST)`."""
