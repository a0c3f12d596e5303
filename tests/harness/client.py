"""A client's side of the gateway: bodies, answers, events, and HTTP/1 by the byte where a library is too careful.

bearer, chat         a request's headers and body
events               the data of an event stream's events
RawClient            one HTTP/1 connection: `send` any bytes, `answer` reads one answer
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hello there!"}], **fields}


def events(text: str | bytes) -> list[str]:
    """The data lines of an event stream, in order."""
    lines = (text.decode() if isinstance(text, bytes) else text).replace("\r\n", "\n").split("\n")
    return [line[6:] for line in lines if line.startswith("data: ")]


def contents(text: str | bytes) -> list[dict[str, Any]]:
    """The JSON events, without [DONE]."""
    return [json.loads(one) for one in events(text) if one != "[DONE]"]


@dataclass(frozen=True, slots=True)
class RawAnswer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of our error shape; empty where the answer is none of ours."""
        try:
            return str(self.json()["error"]["code"])
        except (ValueError, TypeError, KeyError):
            return ""


class RawClient:
    """`async with RawClient(url) as client`. One connection."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._timeout_s = timeout_s
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(self._timeout_s):
            self.writer.write(data)
            await self.writer.drain()

    async def request(
        self, body: bytes | None, *, method: str = "POST", path: str = CHAT, headers: dict[str, str] | None = None
    ) -> RawAnswer:
        """A request with exactly these headers (and a content-length where there is a body), and its answer."""
        await self.send(head(method, path, headers or {}, body) + (body or b""))
        return await self.answer()

    async def answer(self) -> RawAnswer:
        async with asyncio.timeout(self._timeout_s):
            status, headers = await self._head()
            if headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(await self.reader.readline(), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readline()
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
            return RawAnswer(status, headers, body)

    async def _head(self) -> tuple[int, dict[str, str]]:
        while True:
            line = await self.reader.readline()
            if not line:
                raise ConnectionResetError("closed without an answer")
            status = int(line.split()[1])
            headers = {}
            while (line := (await self.reader.readline()).strip()) != b"":
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            if status != 100:
                return status, headers


def head(method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
    """A request's head as it goes over the wire."""
    named = {"Host": "gateway", **headers}
    if body is not None:
        named.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
