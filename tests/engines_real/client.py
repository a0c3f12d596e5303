"""A tenant's side: requests through the gateway, streams read chunk by chunk."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    request_id: str
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def data(self) -> list[str]:
        """Of a stream's events, in order."""
        return [line[6:] for line in self.text.split("\n") if line.startswith("data: ")]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in self.data if one != "[DONE]"]


@dataclass(frozen=True, slots=True)
class Client:
    session: aiohttp.ClientSession
    url: str
    secret: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"} if self.secret else {}

    async def ask(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
        async with self.session.post(self.url + path, json=body, headers={**self.headers, **(headers or {})}) as answer:
            return Answer(answer.status, answer.headers.get("x-request-id", ""), await answer.text())

    async def ok(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
        answer = await self.ask(path, body, headers)
        assert answer.status == 200, answer
        return answer

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[str, AsyncIterator[str]]]:
        """(request id, empty where no gateway gives one; data of each event as it comes); leaving closes it all."""
        async with self.session.post(self.url + path, json=body, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            yield answer.headers.get("x-request-id", ""), _data(answer)
            answer.close()


async def _data(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def chat(text: str = "Hello!", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny-chat", "messages": [{"role": "user", "content": text}], **fields}


def body_for(path: str, text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """The same question in the words of each API, answered with exactly `tokens` tokens."""
    whole = {"model": "tiny-chat", "ignore_eos": True, **fields}
    asked = [{"role": "user", "content": text}]
    return whole | {
        CHAT: {"messages": asked, "max_tokens": tokens},
        COMPLETIONS: {"prompt": text, "max_tokens": tokens},
        RESPONSES: {"input": text, "max_output_tokens": tokens},
        MESSAGES: {"messages": asked, "max_tokens": tokens},
    }[path]  # fmt: skip
