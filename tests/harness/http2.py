"""A client that speaks HTTP/2 without TLS from its first byte (prior knowledge): one request on one connection."""

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.errors
import h2.events

from tests.harness.client import RawAnswer

PIECE_BYTES = 16_000


async def http2_request(
    url: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    method: str = "POST",
    say_length: bool = True,
    trailers: Mapping[str, str] | None = None,
    reset_after_bytes: int | None = None,
    timeout_s: float = 60.0,
) -> RawAnswer:
    """Raises ConnectionResetError where the stream is reset. With `reset_after_bytes` of the answer's body it is we who
    reset the stream, and the connection stays as it is for a moment.
    """
    parts = urlsplit(url)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            exchange = _Exchange(reader, writer, reset_after_bytes)
            return await exchange.run(method, path, headers, body, say_length, trailers)
        finally:
            writer.transport.abort()


class _Exchange:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reset_after_bytes: int | None
    ) -> None:
        self._reader, self._writer, self._reset_after_bytes = reader, writer, reset_after_bytes
        self._http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._ended = False

    async def run(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        say_length: bool,
        trailers: Mapping[str, str] | None,
    ) -> RawAnswer:
        http2 = self._http2
        http2.initiate_connection()
        stream = http2.get_next_available_stream_id()
        lines = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "gateway")]
        lines += [(name.lower(), value) for name, value in headers.items()]
        if body is not None and say_length:
            lines.append(("content-length", str(len(body))))
        http2.send_headers(stream, lines, end_stream=body is None)
        rest = body or b""
        while rest and not self._ended:
            room = min(http2.local_flow_control_window(stream), PIECE_BYTES)
            if room == 0:
                await self._read()
                continue
            http2.send_data(stream, rest[:room], end_stream=room >= len(rest) and not trailers)
            rest = rest[room:]
            await self._write()
        if trailers and not self._ended:
            http2.send_headers(stream, list(trailers.items()), end_stream=True)
        await self._write()
        while not self._ended:
            await self._read()
        return RawAnswer(int(self._headers[":status"]), self._headers, b"".join(self._body))

    async def _write(self) -> None:
        self._writer.write(self._http2.data_to_send())
        await self._writer.drain()

    async def _read(self) -> None:
        data = await self._reader.read(65536)
        if not data:
            raise ConnectionResetError("connection closed")
        for event in self._http2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self._headers = {str(name): str(value) for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                self._body.append(event.data)
                self._http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                most = self._reset_after_bytes
                if most is not None and not self._ended and sum(map(len, self._body)) >= most:
                    self._http2.reset_stream(event.stream_id, h2.errors.ErrorCodes.CANCEL)
                    await self._write()
                    self._ended = True
                    await asyncio.sleep(0.3)
            elif isinstance(event, h2.events.StreamEnded):
                self._ended = True
            elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                raise ConnectionResetError(str(event))
        await self._write()
