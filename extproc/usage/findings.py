"""What every tap finds out about a response, and the estimate for a client that left before the engine's own count."""

from extproc.usage.model import Usage

TOKEN_BYTES = 4
"""mean length of a token's text, rounded: 4 to 4.5 bytes in English, 3 to 4 in code and in CJK"""
CROWDED_BYTES = 8
"""mean text per event above which events hold several tokens: single tokens stay near 4.5 bytes, pairs come near 9.
Scripts of three bytes a letter with long tokens (Hindi, Thai) may pass it and are then estimated too high, pairs of
code tokens too low."""


class Findings:
    """The attributes of `Tap`, and the counts behind `delivered_tokens`. Lives as long as the response."""

    __slots__ = ("decodes", "done", "error", "events", "final", "newest", "parallel", "started", "text_bytes", "usage")

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.error = ""
        self.started = False
        self.done = False
        self.final = False
        self.decodes = False
        self.events = 0
        """content events since `usage` (one per choice that an event carries)"""
        self.text_bytes = 0
        """UTF-8 length of the text in those events"""
        self.parallel = False
        """several choices: vLLM's running usage counts only the choice that it rides on, so `events` is never reset"""
        self.newest: dict[str, int] | None = None
        """Anthropic's usage fields, each from the newest event that had it"""

    def fail(self, reason: str) -> None:
        """The first failure stays: what follows it is its echo."""
        if not self.error:
            self.error = reason

    def replace_usage(self, usage: Usage) -> None:
        """The last value replaces. What was delivered up to here is inside it."""
        self.usage = usage
        if not self.parallel:
            self.events = self.text_bytes = 0

    def dispensable(self) -> bool:
        """Bytes go out as they come."""
        return True

    def delivered_tokens(self) -> int:
        """Completion tokens that went by, as far as the body tells.

        final usage    its completion tokens
        no usage       E, where E = events, if text_bytes <= 8 x events, else text_bytes / 4 rounded up
        running usage  its completion tokens + E of what came after it (several choices: the larger of the two)

        Engines send one token per content event while they keep up (vLLM: 1500 tokens in 1487 to 1502 events; a token
        that ends inside a character has an event with empty text, which counts). Responses and Anthropic deltas and
        engines that send every n-th step hold several tokens: their events carry 9 bytes and more on average, and then
        only the text tells. The larger of both would overcharge every stream whose tokens are longer than 4 bytes.
        Not seen, so not counted: what the engine swallowed (Dynamo drops empty deltas; tool and reasoning marks).
        """
        events, text_bytes = self.events, self.text_bytes
        since = events if text_bytes <= CROWDED_BYTES * events else -(-text_bytes // TOKEN_BYTES)
        if self.usage is None:
            return since
        if self.final:
            return self.usage.completion
        return max(self.usage.completion, since) if self.parallel else self.usage.completion + since
