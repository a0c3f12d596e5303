"""Server: one engine behind one listening socket.

`start` binds and tells the address; `drain` stops accepting, lets requests in progress finish within the time allowed,
then cuts what is left.
"""

import asyncio
from pathlib import Path

from simengine.api import Api
from simengine.connection import Connection, Dates
from simengine.engine import Engine
from simengine.settings import Settings


class Server:
    """Started once on the running loop, drained once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._socket_path: Path | None = None
        self.engine: Engine | None = None

    async def start(self, listen: str) -> str:
        """Listen on `host:port` (port 0: any free one) or `unix:PATH`; returns the URL.

        Raises:
            OSError: the address cannot be bound.
            ValueError: it is none.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        engine = self.engine = Engine(settings, loop)
        handle, dates = Api(engine).handle, Dates()

        def connect() -> Connection:
            return Connection(handle, self._peers, dates, settings.max_body_bytes, settings.keep_alive_timeout_s)

        if listen.startswith("unix:"):
            path = Path(listen.removeprefix("unix:"))
            self._socket_path = path
            self._server = await loop.create_unix_server(connect, str(path), backlog=4096)
            return f"unix:{path}"
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdecimal():
            raise ValueError(f"{listen!r} is no HOST:PORT")
        host = host.removeprefix("[").removesuffix("]")
        self._server = await loop.create_server(connect, host or "127.0.0.1", int(port), backlog=4096)
        bound = self._server.sockets[0].getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        return f"http://{shown}:{bound[1]}"

    async def drain(self) -> bool:
        """Whether everything in progress could finish."""
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.drain()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._settings.shutdown_timeout_s
        # Polled: this is the end of life, and an event would cost every connection something.
        while self._peers and loop.time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        finished = not self._peers
        for peer in list(self._peers):
            peer.abort()
        while self._peers:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if self.engine is not None:
            self.engine.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        return finished
