"""Plan: everything about one answer that is known before its first token."""

from dataclasses import dataclass
from typing import Protocol

from simengine.settings import Flavor, UsagePlacement

_FINGERPRINT = b'"vllm-sim-00000000"'


@dataclass(slots=True)
class Choice:
    pieces: list[bytes]
    """its tokens' texts, each ready as the inside of a JSON string"""
    finish_reason: bytes
    """stop | length"""
    stop_reason: bytes = b"null"
    """JSON: the stop string that ended it"""


@dataclass(slots=True)
class Plan:
    request_id: bytes
    """JSON-escaped, without the API's prefix"""
    model: bytes
    """JSON-escaped name that the answer carries"""
    created_s: int
    flavor: Flavor
    prompt_tokens: int
    cached_tokens: int
    choices: list[Choice]
    usage: UsagePlacement
    """where a stream carries usage"""
    include_usage: bool
    """the client asked for it"""
    details: bool
    """prompt_tokens_details are switched on"""
    block_size_tokens: int = 16
    no_usage: bool = False
    """a fault: not even where it always is"""
    tool: bytes = b""
    """JSON-escaped name of the tool that every choice calls, its text being the one argument; empty: none"""
    top_logprobs: int | None = None
    """candidates to tell for each token; None: no log probabilities"""

    @property
    def completion_tokens(self) -> int:
        return sum([len(choice.pieces) for choice in self.choices])

    @property
    def fingerprint(self) -> bytes:
        return _FINGERPRINT

    def usage_json(self, completion_tokens: int, whole: bool) -> bytes:
        """OpenAI's usage object. `whole`: as in an answer that is not streamed, where vLLM writes its nulls."""
        numbers = b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % (
            self.prompt_tokens,
            self.prompt_tokens + completion_tokens,
            completion_tokens,
        )
        if self.flavor == "sglang":
            details = b'{"cached_tokens":%d}' % self.cached_tokens if self.details else b"null"
            return b'%b,"prompt_tokens_details":%b,"reasoning_tokens":0}' % (numbers, details)
        if self.details:
            details = b'{"cached_tokens":%d,"created_cache_tokens":%d,"multimodal_tokens":null}' % (
                self.cached_tokens,
                self.prompt_tokens - self.cached_tokens,
            )
            numbers += b',"prompt_tokens_details":' + details
            return numbers + (b',"completion_tokens_details":null}' if whole else b"}")
        if whole:
            return numbers + b',"prompt_tokens_details":null,"completion_tokens_details":null}'
        return numbers + b"}"


class Answer(Protocol):
    """One API's way to say a plan. Events come complete, with their blank line."""

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""

    def opening(self) -> list[bytes]:
        """Events that leave together with the first token."""

    def tokens(self, first: int, last: int) -> list[bytes]:
        """Events of the token positions first ≤ k < last, of every choice."""

    def closing(self) -> list[bytes]:
        """Events after the last token."""
