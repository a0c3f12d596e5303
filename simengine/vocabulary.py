"""Vocabulary: the text that the engine "generates", and the token count of a prompt.

Tokeniser, stated so that tests can compute it: one token per four UTF-8 bytes of the prompt's text, rounded up, at
least one; so never more tokens than bytes (of a prompt that is not empty). Each image, audio or other part counts 64.
An answer is a run of words from one seeded, cyclic list; where it starts depends on seed, prompt and choice, so the
same request gets the same text from every engine of the same seed.
"""

import random
import zlib
from typing import TypeVar

import msgspec

BYTES_PER_TOKEN = 4
MEDIA_TOKENS = 64
_T = TypeVar("_T")
_SIZE = 4096
_SYLLABLES = ("ka", "lo", "mi", "ren", "ta", "so", "vi", "nor", "du", "el", "pa", "shi", "quo", "zen", "bra", "ui")
_AWKWARD = (
    ' "usage":{"prompt_tokens":1,"completion_tokens":1}',
    "\n\ndata: [DONE]\n\n",
    "data: {}\n\n",
    ' \\"usage\\"',
    " caf\u00e9",
    "\u6f22\u5b57",
    "\U0001f680",
    "\r\n",
    "",
    ' {"error":{"code":500}}',
    "event: error\n",
    "\u2028",
)
_quote = msgspec.json.Encoder().encode


def count_tokens(text_bytes: int, media_parts: int = 0) -> int:
    """Prompt tokens of so many bytes of text and so many media parts."""
    return max(1, (text_bytes + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN + MEDIA_TOKENS * media_parts)


def quoted(text: str) -> bytes:
    """The text as the inside of a JSON string, without the quotes."""
    return _quote(text)[1:-1]


class Vocabulary:
    """Seeded words, each also ready as the inside of a JSON string."""

    __slots__ = ("_quoted", "_seed", "_words")

    def __init__(self, seed: int, awkward: bool = False) -> None:
        rng = random.Random(seed)  # noqa: S311 - repeatable text, not a secret
        words = [" " + "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(_SIZE)]
        if awkward:
            words = [rng.choice(_AWKWARD) if rng.random() < 0.5 else word for word in words]
        # Twice in a row: a run of up to _SIZE tokens from any start is one slice.
        self._words = words * 2
        self._quoted = [quoted(word) for word in words] * 2
        self._seed = seed

    def start(self, prompt: bytes, request_seed: int | None, choice: int) -> int:
        mixed = zlib.crc32(prompt, self._seed & 0xFFFFFFFF)
        return (mixed + (request_seed or 0) + 97 * choice) % _SIZE

    def words(self, start: int, count: int) -> list[str]:
        return _run(self._words, start, count)

    def quoted_words(self, start: int, count: int) -> list[bytes]:
        """`count` tokens, JSON-escaped."""
        if count <= _SIZE:
            return self._quoted[start : start + count]
        return _run(self._quoted, start, count)


def _run(cycle: list[_T], start: int, count: int) -> list[_T]:
    run = cycle[start : start + min(count, _SIZE)]
    while len(run) < count:
        run += run[: count - len(run)]
    return run
