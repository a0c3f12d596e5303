"""Bodies that are not event streams: one JSON document, or something that nobody here can read."""

import json
import re

import msgspec

from extproc.usage.findings import TOKEN_BYTES, Findings
from extproc.usage.model import NOT_GENERATING, Api, Usage
from extproc.usage.shapes import Body, decode_body, failure, merge_anthropic, read_usage, read_usual_body

BODY_MAX = 1024 * 1024
"""decoded whole up to here (about a millisecond); more is no answer in words but a set of vectors"""
TAIL_BYTES = 64 * 1024
"""of a longer body; every engine writes usage behind the vectors, choices or output"""

_OPENAI = {"chat", "completions", "embeddings"}
_NO_TOKENS = Usage(0, 0)
_usage_key = re.compile(r'"usage"\s*:\s*(?=\{)')


class JsonTap(Findings):
    """A `Tap` for one JSON document. It is read at its end; until then nothing is known but that it began."""

    __slots__ = ("_api", "_long", "_parts", "_size")

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api
        self._parts: list[bytes] = []
        self._size = 0
        self._long = False

    def feed(self, chunk: bytes, end: bool) -> bytes | None:
        """Collects; always passes on as it is."""
        if chunk:
            self.started = True
            self.text_bytes += len(chunk)
            self._size += len(chunk)
            self._parts.append(chunk)
            if self._size > BODY_MAX:
                self._shorten()
        if end and not self.done:
            parts = self._parts
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            self._parts = []
            if self._long:
                self._read_tail(body)
            else:
                self._read(body)
        return None

    def _shorten(self) -> None:
        """Drop what the tail does not need; at most BODY_MAX are held between two of these."""
        self._long = True
        tail = b"".join(self._parts)[-TAIL_BYTES:]
        self._parts = [tail]
        self._size = len(tail)

    def _read(self, data: bytes) -> None:
        if self._api in _OPENAI:
            self.usage = read_usual_body(data)
            if self.usage is not None:
                self.done = self.final = True
                return
        try:
            body = decode_body(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return
        self.done = True
        self._take(body)

    def _read_tail(self, tail: bytes) -> None:
        """The last usage object. The key cannot stand in a text: there its quotes would be escaped."""
        text = tail.decode("utf-8", "replace")
        keys = [key.end() for key in _usage_key.finditer(text)]
        if not keys:
            return
        try:
            usage, _ = json.JSONDecoder().raw_decode(text, keys[-1])
        except (ValueError, RecursionError):
            return
        self.done = True
        self._take(Body(usage=usage))

    def _take(self, body: Body) -> None:
        self.error = failure(body)
        if self._api == "messages":
            self.usage = merge_anthropic({}, body.usage)
        elif self._api == "count_tokens":
            self.usage = None if self.error else _NO_TOKENS
        else:
            self.usage = read_usage(body.usage)
        self.final = self.usage is not None

    def delivered_tokens(self) -> int:
        """The engine's count; of a body without one, or cut short, its bytes / 4: too many, the envelope is in it."""
        if self.usage is not None:
            return self.usage.completion
        if self.error or self._api in NOT_GENERATING:
            return 0
        return self.text_bytes // TOKEN_BYTES


class BlindTap(Findings):
    """A `Tap` for content types and encodings that are not read: everything passes, nothing is found."""

    __slots__ = ()

    def feed(self, chunk: bytes, end: bool) -> bytes | None:
        self.started = self.started or bool(chunk)
        return None
