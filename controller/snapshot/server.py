"""The stream's server end: one coroutine per follower, its own cursor, no queue that could grow; and its reports' end.

grpcio's asyncio server, as everything below the messages is: followers are few (one per replica of extproc), so what
its calls cost does not matter, and its flow control holds back whoever reads slowly. Who falls too far behind gets the
whole state again. On a unix socket the file's mode (0600) is the lock; a TCP address carries no TLS and is for
loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import grpc
import grpc.aio
import structlog

from apis.records import METHOD, REPORT_METHOD
from apis.wire.snapshot_pb2 import FollowRequest, FollowResponse, Pulse, ReportRequest, ReportResponse
from controller.snapshot.feed import Feed

PULSE_S: Final = 1.0
WRITE_TIMEOUT_S: Final = 30.0
_GRACE_S: Final = 0.2

_log = structlog.get_logger(__name__)


class PolicyServer:
    """An async context manager. `address` is unix:PATH or HOST:PORT (0: any port); `on_report` gets their reports."""

    def __init__(
        self,
        feed: Feed,
        address: str,
        *,
        ready: asyncio.Event,
        view_age_s: Callable[[], float],
        on_report: Callable[[ReportRequest], None] = lambda _report: None,
        pulse_s: float = PULSE_S,
    ) -> None:
        self.address = address
        """with the real port, once it listens"""
        self._feed, self._ready, self._view_age_s, self._pulse_s = feed, ready, view_age_s, pulse_s
        self._on_report = on_report
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        """Raises OSError where the address cannot be had."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 16)])
        server.add_generic_rpc_handlers((_Handler(self._follow, self._report),))
        with _only_ours(self.address):
            try:
                port = server.add_insecure_port(self.address)
            except RuntimeError as error:
                raise OSError(f"cannot listen on {self.address}") from error
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await server.start()
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(_GRACE_S)
        self._server = None

    async def _follow(self, request: FollowRequest, context: Any) -> None:
        waker = self._feed.waker()
        try:
            _log.info("a follower came", follower=request.follower, generation=request.generation)
            async with contextlib.aclosing(self._told(request, waker)) as messages:
                async for message in messages:
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await context.write(message)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the follower does not read")
        finally:
            self._feed.forget(waker)
            _log.info("a follower left", follower=request.follower)

    async def _report(self, request: ReportRequest, context: Any) -> ReportResponse:
        if not self._ready.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the policy is not known yet")
        self._on_report(request)
        return ReportResponse()

    async def _told(self, request: FollowRequest, waker: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """What one follower gets, for ever. Between looking and the message there is no await: they belong together."""
        feed, loop = self._feed, asyncio.get_running_loop()
        while not self._ready.is_set():
            yield FollowResponse(pulse=Pulse(ready=False)).SerializeToString()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), self._pulse_s)
        known = feed.knows(request.epoch, request.generation, request.checksum)
        cursor = request.generation if known else -1
        load_number, pulse_at = 0, loop.time()
        while True:
            waker.clear()
            changes = feed.since(cursor) if cursor >= 0 else None
            now = feed.generation
            for message in feed.parts() if changes is None else changes:
                yield message
            cursor = now
            if cursor != feed.generation:
                continue
            if feed.load_number != load_number:
                load_number = feed.load_number
                yield feed.load
                continue
            if loop.time() >= pulse_at:
                pulse_at = loop.time() + self._pulse_s
                yield feed.pulse(self._view_age_s())
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(pulse_at):
                    await waker.wait()


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, follow: Any, report: Any) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {
            METHOD: grpc.unary_stream_rpc_method_handler(  # type: ignore[no-untyped-call]
                follow, request_deserializer=FollowRequest.FromString, response_serializer=None
            ),
            REPORT_METHOD: grpc.unary_unary_rpc_method_handler(  # type: ignore[no-untyped-call]
                report,
                request_deserializer=ReportRequest.FromString,
                response_serializer=ReportResponse.SerializeToString,
            ),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)


@contextlib.contextmanager
def _only_ours(address: str) -> Iterator[None]:
    """While grpcio binds and listens in one step: a socket file that nobody else may open at any moment."""
    if not address.startswith("unix:"):
        yield
        return
    path = Path(address.removeprefix("unix:"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):  # left by a life that was killed
            path.unlink()
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
