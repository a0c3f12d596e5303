"""A client that sees bytes: what a library would hide is what these tests are about."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from simengine.server import Server
from simengine.settings import Settings


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, path: str, body: object, *headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
        self.send("\r\n".join([*lines, *headers, "", ""]).encode() + data)

    def get(self, path: str) -> None:
        self.send(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        text = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)).decode()
        status, *lines = text.rstrip().split("\r\n")
        return int(status.split(" ")[1]), dict(line.split(": ", 1) for line in lines)

    async def chunk(self) -> bytes:
        size = int((await asyncio.wait_for(self.reader.readuntil(b"\r\n"), 60)).strip(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self) -> list[bytes]:
        found = []
        while chunk := await self.chunk():
            found.append(chunk)
        return found

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """A whole response, whatever its framing."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join(await self.chunks())
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        return status, headers, await self.rest()

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 60)


class Engine:
    """A server in this process, and ways to talk to it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Raw]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
        try:
            yield Raw(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def post(self, path: str, body: object, *headers: str) -> tuple[int, dict[str, str], bytes]:
        async with self.connect() as raw:
            raw.post(path, body, *headers)
            return await raw.answer()

    async def json(self, path: str, body: object, *headers: str, status: int = 200) -> Any:
        got, _, data = await self.post(path, body, *headers)
        assert got == status, data
        return json.loads(data)

    async def stream(self, path: str, body: dict[str, object], *headers: str) -> list[bytes]:
        """The events of a streamed answer, without their blank lines."""
        status, _, data = await self.post(path, {**body, "stream": True}, *headers)
        assert status == 200, data
        assert data.endswith(b"\n\n")
        return data[:-2].split(b"\n\n")

    async def get(self, path: str) -> bytes:
        async with self.connect() as raw:
            raw.get(path)
            status, _, data = await raw.answer()
            assert status == 200, data
            return data

    async def metrics(self) -> dict[str, float]:
        """Values by name, or by name{labels} without the constant ones."""
        found: dict[str, float] = {}
        for line in (await self.get("/metrics")).decode().splitlines():
            if line.startswith("#") or "_bucket" in line:
                continue
            name, _, value = line.rpartition(" ")
            bare, _, labels = name.partition("{")
            found[bare] = found.get(bare, 0.0) + float(value)
            for label in labels.rstrip("}").split(","):
                found[f"{bare}{{{label}}}"] = float(value)
        return found


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Engine]:
    server = Server(Settings(**{"models": ("sim", "alias"), "shutdown_timeout_s": 0.0, **settings}))
    url = await server.start("127.0.0.1:0")
    try:
        yield Engine(server, url)
    finally:
        await server.drain()


def payload(event: bytes) -> Any:
    """The JSON of an event's data line."""
    return json.loads(event[event.index(b"data: ") + 6 :])


CHAT = "/v1/chat/completions"


def chat(text: str = "hello there", **fields: object) -> dict[str, object]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], **fields}
