"""The lean gRPC server end, for Envoy: our own HTTP/2 on asyncio (best on uvloop).

Envoy's many short streams cost this end about a fiftieth of what they cost grpcio's asyncio server. TLS is asyncio's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from extproc.transport.connection import Connection
from extproc.transport.core import HEAR_S, LET_GO_EVERY_S, LET_GO_S
from extproc.transport.link import Limits
from extproc.transport.listening import CertificateFiles, SocketFile, address_of, listen, tls_context, unix_path
from extproc.transport.register import Register
from extproc.transport.routing import Router

if TYPE_CHECKING:
    from extproc.transport.core import Services
    from extproc.transport.health import Health


class H2Server:
    """A `core.Server`."""

    def __init__(
        self,
        listener: asyncio.Server,
        connections: Register,
        *,
        address: str,
        socket_file: SocketFile | None,
        health: Health | None,
    ) -> None:
        self.address = address
        self._listener = listener
        self._connections = connections
        self._socket_file = socket_file
        self._health = health

    async def drain(self, timeout_s: float) -> None:
        if self._health is not None:
            self._health.drain()
        self._stop_listening()
        connections = list(self._connections)
        for connection in connections:
            connection.begin_drain()
        if connections:
            await asyncio.wait([connection.ended for connection in connections], timeout=timeout_s)
        # By count: a process that is held up for as long has asked nobody meanwhile.
        for _ in range(round(LET_GO_S / LET_GO_EVERY_S)):
            if not self._connections:
                return
            for connection in list(self._connections):
                connection.let_go()
            await asyncio.sleep(LET_GO_EVERY_S)
        # Whose streams are over waits only for its peer to have heard so, and that may be a busy one.
        ending = [connection.ended for connection in self._connections if connection.over()]
        if ending:
            await asyncio.wait(ending, timeout=HEAR_S)

    async def close(self) -> None:
        self._stop_listening()
        connections = list(self._connections)
        for connection in connections:
            connection.shut()
        if connections:
            # Each closes by itself, or is aborted after a second where its peer does not read.
            await asyncio.wait([connection.ended for connection in connections], timeout=3.0)

    def _stop_listening(self) -> None:
        self._connections.closed = True
        self._listener.close()
        if self._socket_file is not None:
            self._socket_file.remove()


async def serve(
    services: Services,
    address: str,
    *,
    tls: CertificateFiles | None = None,
    health: Health | None = None,
    max_message_bytes: int = 64 << 20,
    max_concurrent_streams: int = 100_000,
    reuse_port: bool = False,
    limits: Limits | None = None,
) -> H2Server:
    """Listen on `address` (HOST:PORT or unix:PATH); `limits` overrides both maxima and the rest of them.

    Raises OSError where the address cannot be had, ValueError where it cannot be read.
    """
    limits = limits or Limits(max_message_bytes=max_message_bytes, max_concurrent_streams=max_concurrent_streams)
    router = Router({**services, **(health.services if health is not None else {})})
    context = None if tls is None else tls_context(tls)
    connections = Register()
    loop = asyncio.get_running_loop()
    sock = listen(address, reuse_port=reuse_port)
    path = unix_path(address)
    socket_file = None if path is None else SocketFile(path)

    def accept() -> asyncio.BaseProtocol:
        return cast("asyncio.BaseProtocol", Connection(router, limits, connections, loop))

    handshake_s = None if context is None else limits.handshake_timeout_s
    try:
        if path is None:
            listener = await loop.create_server(accept, sock=sock, ssl=context, ssl_handshake_timeout=handshake_s)
        else:
            listener = await loop.create_unix_server(accept, sock=sock, ssl=context, ssl_handshake_timeout=handshake_s)
    except BaseException:
        sock.close()
        raise
    return H2Server(
        listener,
        connections,
        address=address_of(sock) if path is None else address,
        socket_file=socket_file,
        health=health,
    )
