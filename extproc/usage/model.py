"""What a response tap is told and finds out."""

from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

Api: TypeAlias = Literal[
    "chat", "completions", "embeddings", "responses", "messages", "count_tokens", "rerank", "score"
]
"""count_tokens: Anthropic's question how long a prompt is. A request like any other, which uses no tokens"""
NOT_GENERATING: Final[frozenset[Api]] = frozenset({"embeddings", "count_tokens", "rerank", "score"})
"""APIs whose answers hold no completion tokens"""


class Usage(NamedTuple):
    """Tokens as the engine counted them. `prompt` is inclusive of cached, `completion` inclusive of reasoning."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0


class Tap(Protocol):
    """Follows one response body, cut anywhere. Never raises on any input; what it cannot read, it passes on."""

    usage: Usage | None
    """the last one seen replaces all before; an explicit zero is a value, None is absence"""
    error: str
    """message-free stable reason once the body told of a failure (an error event before or after [DONE]); else empty"""
    started: bool
    """a first content event has passed (for TTFT)"""
    done: bool
    """the API's own end mark was seen ([DONE], response.completed, message_stop, whole JSON)"""
    final: bool
    """`usage` is the engine's total; while false, it is only the state so far (charge `delivered_tokens` instead)"""
    decodes: bool
    """`feed` returns the body decoded: the caller drops content-encoding and content-length before it goes out"""

    def feed(self, chunk: bytes, end: bool) -> bytes | None:
        """One piece of the body. None: pass it on as it is. Bytes: pass these on instead (may be empty)."""

    def dispensable(self) -> bool:
        """From here on the body may go out without this tap: nothing is held back, and bytes leave as they come."""

    def delivered_tokens(self) -> int:
        """Estimate of the completion tokens that went by so far, for a client that left."""
