"""An engine that answers what a test wrote, byte for byte: what no simulated or real one gives on demand."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http import HTTPStatus
from typing import Any, Self

USAGE = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}


class ScriptedEngine:
    """Listens while entered. Healthy to probes; each POST gets `answer`, then the connection ends."""

    def __init__(self) -> None:
        self.answer = b""
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader, contextlib.suppress(OSError, ValueError):
            connection.settimeout(30)
            method = reader.readline().split(b" ")[0]
            length = 0
            while (line := reader.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            reader.read(length)
            connection.sendall(self.answer if method == b"POST" else http_answer(200))


def http_answer(status: int, body: bytes | dict[str, Any] = b"", *headers: tuple[str, str]) -> bytes:
    """An HTTP/1.1 answer that ends with its connection."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = [("connection", "close"), *headers]
    if status != HTTPStatus.NO_CONTENT:
        named.append(("content-length", str(len(content))))
    if content and "content-type" not in dict(headers):
        named.append(("content-type", "application/json"))
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in named)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def completion(**more: Any) -> dict[str, Any]:
    """A chat completion as OpenAI's API has it, with `USAGE`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "Well."}, "finish_reason": "stop"}
    return {"id": "c-1", "object": "chat.completion", "model": "scripted", "choices": [choice], "usage": USAGE, **more}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(content: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return event(id="c-1", object="chat.completion.chunk", model="scripted", choices=[choice])


DONE = event(id="c-1", object="chat.completion.chunk", model="scripted", choices=[], usage=USAGE) + b"data: [DONE]\n\n"
STREAM = ("content-type", "text/event-stream")
