"""A TCP proxy that breaks connections the way networks do.

async with TcpProxy(port) as proxy:      listens on 127.0.0.1:proxy.port, forwards to 127.0.0.1:port
    proxy.reset()                        RST to every open connection; new ones work
    proxy.black_hole()                   bytes vanish, on open and on new connections, without a sign
    proxy.black_hole(new=False)          open connections are dead (half-open), new ones work
    proxy.refuse()                       new connections are reset at once; open ones too
    proxy.heal()                         new connections work; black-holed ones stay dead
    proxy.delay_s = 0.2                  every chunk comes that much later
    proxy.accepted, proxy.open           counters
    proxy.answered_bytes                 what went back to those who connected
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self


class TcpProxy:
    def __init__(self, port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.accepted = 0
        self.answered_bytes = 0
        self._target = port
        self._black = self._refusing = False
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return len(self._links)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        for link in list(self._links):
            link.reset()

    def black_hole(self, *, new: bool = True) -> None:
        self._black = new
        for link in self._links:
            link.black = True

    def refuse(self) -> None:
        self._refusing = True
        self.reset()

    def heal(self) -> None:
        self._black = self._refusing = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        link = _Link(self, writer, black=self._black)
        try:
            if self._refusing:
                link.reset()
                return
            self._links.add(link)
            # Cancelled only by our end; the loop's own callback would call that an error.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await link.run(reader, self._target)
        finally:
            self._links.discard(link)
            self._tasks.discard(task)
            link.reset()


class _Link:
    def __init__(self, proxy: TcpProxy, down: asyncio.StreamWriter, *, black: bool) -> None:
        self.black = black
        self._proxy, self._down = proxy, down
        self._up: asyncio.StreamWriter | None = None

    async def run(self, reader: asyncio.StreamReader, target: int) -> None:
        answers, self._up = await asyncio.open_connection("127.0.0.1", target)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pump(reader, self._up))
            group.create_task(self._pump(answers, self._down))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if self._proxy.delay_s:
                    await asyncio.sleep(self._proxy.delay_s)
                if not self.black:
                    self._proxy.answered_bytes += len(chunk) if writer is self._down else 0
                    writer.write(chunk)
                    await writer.drain()
            if not self.black and writer.can_write_eof():
                writer.write_eof()

    def reset(self) -> None:
        for writer in (self._down, self._up):
            if writer is not None:
                sock = writer.get_extra_info("socket")
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
