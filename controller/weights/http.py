"""One GET on a connection of its own, at a third of what a client library costs: engines are asked by the thousand.

HTTP/1.0, so that the answer comes in one piece and ends with its length or with the connection. No redirects, no
compression, nothing kept between two requests.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

_HEAD_END: Final = b"\r\n\r\n"
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)


async def get(address: str, path: str, most_bytes: int) -> tuple[int, bytes]:
    """Status and body; the caller bounds the time.

    Raises OSError where there is no connection or it breaks off, ValueError for what is no HTTP or longer than that.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    whole: asyncio.Future[tuple[int, bytes]] = loop.create_future()
    request = f"GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
    transport, _ = await loop.create_connection(
        lambda: _Answer(whole, request, most_bytes), host.strip("[]"), int(port)
    )
    try:
        return await whole
    finally:
        transport.abort()


class _Answer(asyncio.Protocol):
    def __init__(self, whole: asyncio.Future[tuple[int, bytes]], request: bytes, most_bytes: int) -> None:
        self._whole, self._request, self._most_bytes = whole, request, most_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._needed: int | None = None
        """head and body, where the head says how long they are"""
        self._head_seen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size > self._most_bytes:
            self._end(ValueError("the answer is too long"))
            return
        if not self._head_seen:
            self._look_for_length()
        if self._needed is not None and self._size >= self._needed:
            self._end(None)

    def eof_received(self) -> None:
        cut_off = self._size < (self._needed or 1)
        self._end(ConnectionResetError("the answer is cut off") if cut_off else None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionResetError("the connection was closed"))

    def _look_for_length(self) -> None:
        whole = b"".join(self._parts)
        self._parts = [whole]
        end = whole.find(_HEAD_END)
        if end < 0:
            return
        self._head_seen = True
        found = _LENGTH.search(whole, 0, end + 2)
        if found is not None:
            self._needed = end + len(_HEAD_END) + int(found[1])

    def _end(self, error: Exception | None) -> None:
        """The first end counts."""
        if self._whole.done():
            return
        whole = b"".join(self._parts)
        head, found, body = whole.partition(_HEAD_END)
        status = _STATUS.match(head)
        if error is not None:
            self._whole.set_exception(error)
        elif status is None or not found:
            self._whole.set_exception(ValueError("the answer is no HTTP"))
        else:
            length = None if self._needed is None else self._needed - len(head) - len(_HEAD_END)
            self._whole.set_result((int(status[1]), body[:length]))
