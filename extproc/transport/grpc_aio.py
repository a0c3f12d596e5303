"""The portable gRPC server end, on grpcio's asyncio server: any client, TLS by grpc. Same calls as `h2`, at its price.

Each stream is one coroutine of grpcio's: it reads messages, writes what is due, and ends with the status that the call
or `Stream.finish` chose. grpcio tells less than HTTP/2 does: a lost connection is RESET here, and a stream that is cut
at a bad moment may look half-closed (`on_half_close`, then DONE). It enforces a client's deadline itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from extproc.transport.core import LET_GO_EVERY_S, LET_GO_S, CloseReason, GrpcError
from extproc.transport.link import log_failure, may_go
from extproc.transport.listening import CertificateFiles, SocketFile, clear_stale, host_and_port, unix_path

if TYPE_CHECKING:
    from extproc.transport.core import Call, Service, Services
    from extproc.transport.health import Health

_MAX_HELD_MESSAGES: Final = 4
_END_OR_CANCEL_S: Final = 0.001
_READ_ON_BYTES: Final = 1 << 20
"""a stream with more than this left to write is not read from"""
_STATUS: Final = {code.value[0]: code for code in grpc.StatusCode}


class _Stream:
    """`core.Stream` on a grpcio context. Calls on a closed stream do nothing."""

    def __init__(self, context: Any, max_held_bytes: int) -> None:
        self._context = context
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0
        self._output: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._written = asyncio.Event()
        self._status: tuple[int, str] | None = None
        self.call: Call | None = None
        self.reason = CloseReason.DONE

    def send(self, message: bytes) -> None:
        if self.call is None or self._status is not None:
            return
        self._output.append(message)
        self._held_bytes += len(message)
        if self._held_bytes > self._max_held_bytes:
            self._output.clear()
            self.fail(8, "replies pile up")
        self._changed.set()

    def finish(self, grpc_status: int = 0, message: str = "") -> None:
        if self._status is None:
            self._status = (grpc_status, message)
            self._changed.set()

    def fail(self, grpc_status: int, message: str) -> None:
        """End the stream for an error; the call hears of it at once."""
        self.finish(grpc_status, message)
        self.tell_end(CloseReason.ERROR)

    def tell_end(self, reason: CloseReason) -> None:
        call, self.call = self.call, None
        if call is not None:
            try:
                call.on_close(reason)
            except Exception as error:
                log_failure("on_close failed", error)

    def call_failed(self, error: Exception) -> None:
        if isinstance(error, GrpcError):
            self.fail(error.status, error.message)
        else:
            log_failure("a call failed", error)
            self.fail(13, "internal error")

    async def serve(self, service: Service) -> None:
        try:
            self.call = service(self)
        except Exception as error:
            self.call_failed(error)
        reader = asyncio.ensure_future(self._read())
        try:
            while True:
                while self._output:
                    message = self._output.popleft()
                    self._held_bytes -= len(message)
                    await self._context.write(message)
                    self._written.set()
                if self._status is not None:
                    break
                self._changed.clear()
                await self._changed.wait()
            status, text = self._status
            if status:
                self._context.set_code(_STATUS.get(status, grpc.StatusCode.UNKNOWN))
                self._context.set_details(text)
            self.tell_end(CloseReason.DONE)
        finally:
            self.tell_end(CloseReason.RESET)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self) -> None:
        try:
            while self.call is not None:
                message = await self._context.read()
                if message is grpc.aio.EOF:
                    # grpcio reads a cancelled stream as ended, too, and says so in an event that comes a little later.
                    await asyncio.sleep(_END_OR_CANCEL_S)
                    if self._context.cancelled():
                        return
                    break
                if self.call is None:
                    return
                reply = self.call.on_message(message)
                if reply is not None:
                    self.send(reply)
                while self._held_bytes > _READ_ON_BYTES and self.call is not None:
                    self._written.clear()
                    await self._written.wait()
            if self.call is not None and not self.call.on_half_close():
                self.finish()
        except asyncio.CancelledError:
            raise
        except grpc.RpcError:
            self.fail(1, "the stream broke")
        except Exception as error:
            self.call_failed(error)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, services: Services, max_held_bytes: int) -> None:
        self._services = services
        self._max_held_bytes = max_held_bytes
        self.streams: set[_Stream] = set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        service = self._services.get(details.method)
        if service is None:
            return None

        async def behaviour(_requests: Any, context: Any) -> None:
            stream = _Stream(context, self._max_held_bytes)
            self.streams.add(stream)
            try:
                await stream.serve(service)
            finally:
                self.streams.discard(stream)

        handler: grpc.RpcMethodHandler = grpc.stream_stream_rpc_method_handler(behaviour)  # type: ignore[no-untyped-call]
        return handler


class GrpcAioServer:
    """A `core.Server`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        handlers: _Handlers,
        *,
        address: str,
        socket_file: SocketFile | None,
        health: Health | None,
    ) -> None:
        self.address = address
        self._server = server
        self._handlers = handlers
        self._socket_file = socket_file
        self._health = health

    async def drain(self, timeout_s: float) -> None:
        if self._health is not None:
            self._health.drain()
        if self._socket_file is not None:
            self._socket_file.remove()
        stopping = asyncio.ensure_future(self._server.stop(timeout_s + LET_GO_S))
        await asyncio.wait([stopping], timeout=timeout_s)
        while not stopping.done():
            for stream in list(self._handlers.streams):
                if may_go(stream.call):
                    stream.finish()
            await asyncio.wait([stopping], timeout=LET_GO_EVERY_S)

    async def close(self) -> None:
        if self._socket_file is not None:
            self._socket_file.remove()
        await self._server.stop(None)


async def serve(
    services: Services,
    address: str,
    *,
    tls: CertificateFiles | None = None,
    health: Health | None = None,
    max_message_bytes: int = 64 << 20,
    max_concurrent_streams: int = 100_000,
    reuse_port: bool = False,
) -> GrpcAioServer:
    """Listen on `address` (HOST:PORT or unix:PATH).

    Raises OSError where the address cannot be had, ValueError where it cannot be read.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", max_concurrent_streams),
            ("grpc.so_reuseport", int(reuse_port)),
        ]
    )
    everything = {**services, **(health.services if health is not None else {})}
    handlers = _Handlers(everything, _MAX_HELD_MESSAGES * max_message_bytes)
    server.add_generic_rpc_handlers((handlers,))
    path = unix_path(address)
    if path is None:
        host, _ = host_and_port(address)
        port = _bind(server, address, tls)
        await server.start()
        shown = f"[{host}]" if ":" in host else host
        return GrpcAioServer(server, handlers, address=f"{shown}:{port}", socket_file=None, health=health)
    clear_stale(path)
    before = os.umask(0o177)  # grpcio binds and listens in one step: the file must be ours alone from the first moment
    try:
        _bind(server, address, tls)
    finally:
        os.umask(before)
    path.chmod(0o600)
    await server.start()
    return GrpcAioServer(server, handlers, address=address, socket_file=SocketFile(path), health=health)


def _bind(server: grpc.aio.Server, address: str, tls: CertificateFiles | None) -> int:
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            credentials = grpc.ssl_server_credentials(  # type: ignore[no-untyped-call]
                [(tls.key.read_bytes(), tls.certificate.read_bytes())],
                root_certificates=None if tls.client_ca is None else tls.client_ca.read_bytes(),
                require_client_auth=tls.client_ca is not None,
            )
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}") from error
    return int(port)
