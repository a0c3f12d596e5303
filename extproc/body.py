"""A request's JSON body: its top-level fields as raw values, and edits that leave every other byte alone.

The whole body is checked once in C (`msgspec`, about 0.2 us/KB) and its values stay undecoded; only the few fields that
decide anything are looked into. An edit cuts or adds text at a field's place, so that what the engine reads is
otherwise byte for byte what the client wrote.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from extproc.errors import Refused, refused

Fields: TypeAlias = dict[str, msgspec.Raw]

MAX_MODEL_CHARS: Final = 256
_MAX_TOKENS: Final = 10_000_000
_MAX_CHOICES: Final = 128

_encode = msgspec.json.Encoder().encode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_str = msgspec.json.Decoder(str).decode
_decode_any = msgspec.json.Decoder().decode


def parse(body: bytes) -> Fields | Refused:
    """The top-level fields. Refuses what is no JSON object, no UTF-8, too deep, or says a field twice."""
    try:
        if not body.isascii():
            body.decode()  # values stay raw below, where a broken byte would go unseen
        fields = _decode_fields(body)
    except UnicodeDecodeError as error:
        return refused("invalid_json", f"The request body is not valid UTF-8 (byte {error.start}).")
    except RecursionError:
        return refused("invalid_json", "The request body is nested too deeply.")
    except msgspec.ValidationError:
        return refused("invalid_json", "The request body must be a JSON object.")
    except msgspec.DecodeError as error:
        return refused("invalid_json", f"The request body is not valid JSON: {_where(error)}.")
    if not _each_once(body, fields):
        seen: set[str] = set()
        for span in spans(body):
            if span.name in seen:
                return refused(
                    "duplicate_field",
                    f"The field '{_shown(span.name)}' stands in the request body twice; send it once.",
                )
            seen.add(span.name)
    return fields


def _where(error: msgspec.DecodeError) -> str:
    """The parser's own words name a byte and a kind of fault, never content; anything else is kept to ourselves."""
    text = str(error)
    return text.removeprefix("JSON is malformed: ") if text.startswith("JSON is malformed") else "it is cut off"


def _shown(name: str) -> str:
    return name if len(name) <= 64 and name.isprintable() else "(not shown)"


def _each_once(body: bytes, fields: Fields) -> bool:
    """Whether the body is these fields and nothing else, as compact or as Python's default JSON writes them.

    A field said twice would leave bytes over. Bodies written in any other style are walked exactly (`spans`).
    """
    written = _encode(fields)
    if len(body) == len(written) + 2 * len(fields) - 1:
        spaced = [b'"%b": %b' % (name.encode(), value) for name, value in fields.items()]
        written = b"{%b}" % b", ".join(spaced)
    return body == written


class Span(NamedTuple):
    """Where one field of the top-level object stands: name from `start`, value from `value` to `end`."""

    name: str
    start: int
    value: int
    end: int


_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NESTED: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{\]}]', re.DOTALL)
_SCALAR: Final = re.compile(rb"[^\s,}]+")
_BLANK: Final = re.compile(rb"[ \t\r\n]*")


def spans(body: bytes) -> Iterator[Span]:
    """The fields of a JSON object that `parse` has found valid, in order, repeated ones included."""
    at = body.index(b"{") + 1
    while True:
        at = _skip(body, at)
        if body[at] == 0x7D:  # }
            return
        if body[at] == 0x2C:  # ,
            at = _skip(body, at + 1)
        key = _STRING.match(body, at)
        assert key is not None
        value = _skip(body, _skip(body, key.end()) + 1)
        end = _value_end(body, value)
        yield Span(_decode_str(key.group()), at, value, end)
        at = end


def _skip(body: bytes, at: int) -> int:
    blank = _BLANK.match(body, at)
    assert blank is not None
    return blank.end()


def _value_end(body: bytes, at: int) -> int:
    first = body[at]
    if first in b"[{":
        depth = 0
        for part in _NESTED.finditer(body, at):
            mark = body[part.start()]
            if mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 0:
                    return part.end()
    found = (_STRING if first == 0x22 else _SCALAR).match(body, at)
    assert found is not None
    return found.end()


def edit(
    body: bytes, fields: Fields, *, remove: frozenset[str] = frozenset(), put: Mapping[str, Any] | None = None
) -> bytes:
    """The body without the fields in `remove`, with those in `put` set: in place where they stand, else at the end.

    `fields` are the body's. Where none of them is touched the body is not walked, however long it is.
    """
    missing = dict(put or {})
    if not remove and missing.keys().isdisjoint(fields):
        # Added at the very end, so that all the rest, blanks included, stays as it was.
        at = body.rindex(b"}")
        added = b",".join(_written(missing))
        return b"".join((body[:at], b"," if fields and added else b"", added, body[at:]))
    kept = []
    for span in spans(body):
        if span.name in missing:
            kept.append(body[span.start : span.value] + msgspec.json.encode(missing.pop(span.name)))
        elif span.name not in remove:
            kept.append(body[span.start : span.end])
    return b"{" + b",".join((*kept, *_written(missing))) + b"}"


def _written(fields: Mapping[str, Any]) -> list[bytes]:
    return [msgspec.json.encode(name) + b":" + msgspec.json.encode(value) for name, value in fields.items()]


# --- the fields that decide ---------------------------------------------------------------------------------------


def text(fields: Fields, name: str) -> str | Refused | None:
    """A string field; None where it is absent."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _decode_str(raw)
    except msgspec.DecodeError:
        return refused("invalid_field", f"'{name}' must be a string.", param=name)


def flag(fields: Fields, name: str) -> bool | Refused:
    """A boolean field; absent and null are False."""
    raw = fields.get(name)
    if raw is None:
        return False
    value = bytes(raw)
    if value == b"true":
        return True
    if value in (b"false", b"null"):
        return False
    return refused("invalid_field", f"'{name}' must be true or false.", param=name)


_COUNTS: Final = {
    "max_tokens": _MAX_TOKENS,
    "max_completion_tokens": _MAX_TOKENS,
    "max_output_tokens": _MAX_TOKENS,
    "n": _MAX_CHOICES,
    "best_of": _MAX_CHOICES,
}


def check_counts(fields: Fields) -> Refused | None:
    """Fields that bound the answer must be whole numbers from 1 on: a reservation is computed from them."""
    if _COUNTS.keys().isdisjoint(fields):
        return None
    for name in _COUNTS.keys() & fields.keys():
        value, most = bytes(fields[name]), _COUNTS[name]
        if value.isdigit() and len(value) <= 8 and 1 <= int(value) <= most:
            continue
        if value != b"null":
            return refused("invalid_field", f"'{name}' must be a whole number from 1 to {most}.", param=name)
    return None


def wants_usage(fields: Fields) -> bool | Refused:
    """Whether a streaming client asked for the usage event itself."""
    raw = fields.get("stream_options")
    if raw is None:
        return False
    try:
        options = _decode_any(raw)
    except (msgspec.MsgspecError, RecursionError):
        options = False  # valid JSON with a value that no type of ours can hold: 1e999
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool | None):
        return refused(
            "invalid_field",
            "'stream_options' must be an object with a boolean 'include_usage'.",
            param="stream_options",
        )
    return bool(options.get("include_usage"))


def stream_options_with_usage(fields: Fields) -> dict[str, Any]:
    """The client's own stream_options, with include_usage on."""
    raw = fields.get("stream_options")
    options = _decode_any(raw) if raw is not None else None
    return {**(options or {}), "include_usage": True}
