"""Request bodies: only the fields that change what a simulated engine answers. Unknown fields are ignored.

Each body knows its prompt: the text bytes that are counted, and the number of media parts.
"""

from typing import Any, TypeAlias

import msgspec

Tokens: TypeAlias = list[int]
Inputs: TypeAlias = str | list[str | int | Tokens]
"""one text, texts, one text's token ids, or several such lists"""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Part(msgspec.Struct):
    type: str = ""
    text: str | None = None


Content: TypeAlias = str | list[Part] | None


class Message(msgspec.Struct):
    role: str = "user"
    content: Content = None


class Generation(msgspec.Struct):
    """What every generating request may carry."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None

    def prompt(self) -> tuple[bytes, int]:
        raise NotImplementedError

    def output_tokens(self) -> int | None:
        raise NotImplementedError

    def output_param(self) -> str:
        return "max_tokens"

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def called_tool(self) -> str:
        """The tool that the request insists on; empty where it leaves that to the model, which then calls none."""
        return ""

    def logprobs_asked(self) -> int | None:
        """How many candidates per token; None: no log probabilities at all."""
        return None


class ChatBody(Generation, kw_only=True):
    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompt(self) -> tuple[bytes, int]:
        if len(self.messages) == 1 and isinstance(self.messages[0].content, str):
            return self.messages[0].content.encode(), 0
        return _join([message.content for message in self.messages])

    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def called_tool(self) -> str:
        if isinstance(self.tool_choice, dict):
            return _name(self.tool_choice.get("function"))
        return _name(self.tools[0].get("function")) if self.tool_choice == "required" and self.tools else ""

    def logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Generation, kw_only=True):
    prompt_field: Inputs = msgspec.field(name="prompt")
    max_tokens: int | None = 16

    def prompt(self) -> tuple[bytes, int]:
        return b"".join(self.prompts()), 0

    def prompts(self) -> list[bytes]:
        return inputs(self.prompt_field)

    def output_tokens(self) -> int | None:
        return self.max_tokens


class ResponsesBody(Generation, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None

    def prompt(self) -> tuple[bytes, int]:
        parts: list[Content] = [self.instructions]
        if isinstance(self.input, str):
            parts.append(self.input)
        else:
            for item in self.input:
                content = item.get("content")
                if isinstance(content, list):
                    parts.append(msgspec.convert(content, list[Part]))
                elif isinstance(content, str):
                    parts.append(content)
        return _join(parts)

    def output_tokens(self) -> int | None:
        return self.max_output_tokens

    def output_param(self) -> str:
        return "max_output_tokens"


class MessagesBody(Generation, kw_only=True):
    messages: list[Message]
    max_tokens: int
    system: Content = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None

    def prompt(self) -> tuple[bytes, int]:
        return _join([self.system, *(message.content for message in self.messages)])

    def output_tokens(self) -> int | None:
        return self.max_tokens

    def stops(self) -> list[str]:
        return self.stop_sequences or []

    def called_tool(self) -> str:
        choice = self.tool_choice or {}
        if choice.get("type") == "any" and self.tools:
            return _name(self.tools[0])
        return _name(choice) if choice.get("type") == "tool" else ""


class CountTokensBody(msgspec.Struct):
    messages: list[Message]
    model: str | None = None
    system: Content = None

    def prompt(self) -> tuple[bytes, int]:
        return _join([self.system, *(message.content for message in self.messages)])


class EmbeddingBody(msgspec.Struct):
    input: Inputs
    model: str | None = None
    dimensions: int | None = None
    encoding_format: str | None = None


class RerankBody(msgspec.Struct):
    query: str
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None


class ScoreBody(msgspec.Struct):
    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None


def inputs(given: Inputs) -> list[bytes]:
    """One byte string per input; a token id stands for four bytes of text, so that it counts as one token."""
    if isinstance(given, str):
        return [given.encode()]
    tokens = [item for item in given if isinstance(item, int)]
    if tokens:
        return [_token_bytes(tokens)]
    return [
        item.encode() if isinstance(item, str) else _token_bytes(item) for item in given if not isinstance(item, int)
    ]


def _token_bytes(tokens: Tokens) -> bytes:
    return b"".join([(token & 0xFFFFFFFF).to_bytes(4, "big") for token in tokens])


def _name(tool: Any) -> str:
    return str(tool.get("name", "")) if isinstance(tool, dict) else ""


def _join(contents: list[Content]) -> tuple[bytes, int]:
    texts: list[str] = []
    media = 0
    for content in contents:
        if isinstance(content, str):
            texts.append(content)
        elif content:
            for part in content:
                if part.text is not None:
                    texts.append(part.text)
                else:
                    media += 1
    return "".join(texts).encode(), media
