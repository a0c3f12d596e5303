"""Envoy's ext_proc messages, read and written by hand: the few fields we use, straight from and to protobuf bytes.

Why by hand: parsing into message objects and building replies from them costs 5 to 10 us a request with the fastest
protobuf runtime, more than every decision the gateway takes. What is here is proved field by field against an
independent implementation of the whole API (tests/wire). Field numbers: `proto/arks/envoy/v1/ext_proc.proto`.

Reading relies on protobuf's canonical order for the fast paths (Envoy writes fields by number) and falls back to a
general scan for any other order. Whatever is no protobuf raises `BadMessage`.
"""

import functools
import itertools
from typing import Final

REQUEST_HEADERS: Final = 2
RESPONSE_HEADERS: Final = 3
REQUEST_BODY: Final = 4
RESPONSE_BODY: Final = 5
REQUEST_TRAILERS: Final = 6
RESPONSE_TRAILERS: Final = 7

_LEN: Final = 2
ATTRIBUTES: Final = 9


class BadMessage(Exception):  # noqa: N818 - names the message, not the error
    """The bytes are no protobuf message, or not one that fits the schema."""


# --- reading ------------------------------------------------------------------------------------------------------


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at `at` and the position after it."""
    value = shift = 0
    try:
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise BadMessage("varint longer than 64 bits")
    except IndexError:
        raise BadMessage("message ends inside a varint") from None


def fields(data: bytes, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """Every field between `at` and `end` as (number, wire type, start, stop); a varint's value stands in `start`."""
    found = []
    while at < end:
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _LEN:
            size, at = varint(data, at)
            found.append((number, kind, at, at + size))
            at += size
        elif kind == 0:
            value, at = varint(data, at)
            found.append((number, kind, value, at))
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise BadMessage(f"wire type {kind}")
    if at != end:
        raise BadMessage("field runs over the end of its message")
    return found


def kind_of(message: bytes) -> tuple[int, int, int]:
    """Which of the `request` oneof is set, and where its content stands: (field number, start, stop).

    (0, 0, 0) where none is set: newer Envoys may send such messages, and they are to be ignored.
    """
    if len(message) > 1 and 0x12 <= message[0] <= 0x3A and message[0] & 7 == _LEN:
        size, at = message[1], 2
        if size >= 0x80:
            size, at = varint(message, 1)
        if at + size > len(message):
            raise BadMessage("field runs over the end of its message")
        return message[0] >> 3, at, at + size
    for number, kind, start, stop in fields(message, 0, len(message)):
        if kind == _LEN and REQUEST_HEADERS <= number <= RESPONSE_TRAILERS:
            return number, start, stop
    return 0, 0, 0


def body_of(message: bytes) -> tuple[bytes, bool]:
    """The bytes and end_of_stream of a request_body or response_body message.

    Every streamed chunk comes through here. A message that is one HttpBody, or one and Envoy's empty metadata, begins
    for its length with one of two sequences of bytes: without or with end_of_stream. They are kept, so that reading the
    usual one is a comparison.
    """
    size = len(message)
    end = size - 2 if message[-2:] == _EMPTY_METADATA else size
    while True:
        layout = _LAYOUTS.get(end)
        if layout is None:
            layout = _layout(end)
        opening, closing = layout
        if message.startswith(opening, 1):
            return message[len(opening) + 1 : end], False
        if message.startswith(closing, 1) and message[end - 2 : end] == _END_OF_STREAM:
            return message[len(closing) + 1 : end - 2], True
        if end == size:
            break
        end = size  # what looked like metadata is the body's own end
    _, at, end = kind_of(message)
    body, end_of_stream = b"", False
    for number, kind, start, stop in fields(message, at, end):
        if number == 1 and kind == _LEN:
            body = message[start:stop]
        elif number == 2 and kind == 0:
            end_of_stream = bool(start)
    return body, end_of_stream


_EMPTY_METADATA: Final = b"\x42\x00"
_END_OF_STREAM: Final = b"\x10\x01"
_LAYOUTS: Final[dict[int, tuple[bytes, bytes]]] = {}
_LAYOUTS_MOST: Final = 65_536
_NEVER: Final = b"\xff\xff\xff\xff"
"""begins no HttpBody"""


def _layout(size: int) -> tuple[bytes, bytes]:
    """How a body message of `size` bytes goes on behind its tag: without end_of_stream, and with it."""
    if len(_LAYOUTS) >= _LAYOUTS_MOST:
        _LAYOUTS.clear()
    found = []
    for tail in (0, 2):
        begun = _NEVER
        for outer_digits, digits in itertools.product(range(1, 6), repeat=2):
            outer = size - 1 - outer_digits
            body = outer - 1 - digits - tail
            if body > 0 and len(encode_varint(outer)) == outer_digits and len(encode_varint(body)) == digits:
                begun = encode_varint(outer) + b"\x0a" + encode_varint(body)
        found.append(begun)
    layout = _LAYOUTS[size] = (found[0], found[1])
    return layout


def headers_of(message: bytes) -> tuple[int, int, bool, int]:
    """Of a headers message: where its header map stands (start, stop), its end_of_stream, and where its oneof ends."""
    try:
        # Both lengths have two digits wherever Envoy sends headers: from 128 bytes to 16 KiB of them.
        if message[3] == 0x0A and message[1] > 0x7F > message[2] and message[4] > 0x7F > message[5]:
            end = 3 + (message[1] & 0x7F | message[2] << 7)
            stop = 6 + (message[4] & 0x7F | message[5] << 7)
            if stop == end <= len(message):
                return 6, stop, False, end
            if stop + 2 == end <= len(message) and message[stop] == 0x18:
                return 6, stop, message[stop + 1] == 1, end
    except IndexError:
        pass
    _, at, end = kind_of(message)
    block = (at, at)
    end_of_stream = False
    for number, kind, start, stop in fields(message, at, end):
        if number == 1 and kind == _LEN:
            block = (start, stop)
        elif number == 3 and kind == 0:
            end_of_stream = bool(start)
    return *block, end_of_stream, end


class HeaderNames:
    """Headers to look up in header maps together, as the bytes that announce them there.

    A look-up is one bytes search instead of a walk over every header. It cannot be fooled: the needle is a key field
    (0x0a, length, name) followed by a value's tag, and Envoy lets no control character but the tab into a header's
    value, so a forged key could only begin with a length byte, and its value's tag would have to be forged too.
    """

    __slots__ = ("_needles",)

    def __init__(self, *names: str) -> None:
        keys = [b"\x0a" + bytes((len(name),)) + name.encode() for name in names]
        self._needles = tuple((key + b"\x1a", len(key) + 2, key) for key in keys)

    def find(self, message: bytes, at: int, end: int) -> list[bytes | None]:
        """The first non-empty value of each in the map at message[at:end], in the names' order; None where absent."""
        found: list[bytes | None] = []
        search = message.find
        for needle, size, key in self._needles:
            start = search(needle, at, end)
            if start >= 0:
                start += size
                stop = start + message[start - 1]
                if stop <= end and stop < start + 0x80:
                    found.append(message[start:stop])
                    continue
            found.append(_header(message, key, at, end))
        return found


def _header(message: bytes, key: bytes, at: int, end: int) -> bytes | None:
    """Long values, empty ones, and those in `value` (field 2), which clients other than Envoy may send."""
    while True:
        found = message.find(key, at, end)
        if found < 0:
            return None
        at = found + len(key)
        if at < end and message[at] in (0x1A, 0x12):
            size, start = varint(message, at + 1)
            if start + size > end:
                raise BadMessage("header runs over the end of its message")
            return message[start : start + size]
        if (at == end or message[at] == 0x0A) and message[found - 2 : found] == b"\x0a" + bytes((len(key),)):
            return b""  # an empty value is left out on the wire: the entry is its key alone


def attributes_of(message: bytes, at: int) -> tuple[int, int]:
    """Where the attributes stand that Envoy sent with this message; `at` is where the oneof's content ends."""
    for number, kind, start, stop in fields(message, at, len(message)):
        if number == ATTRIBUTES and kind == _LEN:
            return start, stop
    return 0, 0


class Attribute:
    """One of `request_attributes` or `response_attributes`."""

    __slots__ = ("_key",)

    def __init__(self, name: str) -> None:
        self._key = b"\x0a" + bytes((len(name),)) + name.encode() + b"\x12"

    def find(self, message: bytes, at: int, end: int) -> bytes | None:
        """Its google.protobuf.Value among the attributes at message[at:end]; None where it is absent."""
        found = message.find(self._key, at, end)
        if found < 0:
            return None
        size, start = varint(message, found + len(self._key))
        return message[start : start + size]

    def text(self, message: bytes, at: int, end: int) -> str | None:
        """Its value where that is a string."""
        value = self.find(message, at, end)
        if value is None or value[:1] != b"\x1a":
            return None
        _, start = varint(value, 1)
        return value[start:].decode("utf-8", "replace")


# --- writing ------------------------------------------------------------------------------------------------------


def encode_varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _opening(number, len(content)) + content


def _opening(number: int, size: int) -> bytes:
    """What a length-delimited field of this size begins with."""
    if number < 16 and size < 0x80:
        return bytes((number << 3 | _LEN, size))
    return encode_varint(number << 3 | _LEN) + encode_varint(size)


_OVERWRITE: Final = b"\x18\x02"  # append_action OVERWRITE_IF_EXISTS_OR_ADD: a client's own copy never survives


def set_header(name: str, value: bytes) -> bytes:
    """One entry of a HeaderMutation that sets a header and replaces whatever stood there.

    `raw_value` is used: with Envoy's default runtime flags `value` is not read.
    """
    return field(1, field(1, field(1, name.encode()) + field(3, value)) + _OVERWRITE)


def remove_header(name: str) -> bytes:
    """One entry of a HeaderMutation that removes a header."""
    return field(2, name.encode())


def string_struct(values: dict[str, str]) -> bytes:
    """A google.protobuf.Struct of strings."""
    return b"".join(
        field(1, field(1, key.encode()) + field(2, field(3, value.encode()))) for key, value in values.items()
    )


def metadata(namespace: str, content: bytes) -> bytes:
    """One namespace of ProcessingResponse.dynamic_metadata; `content` is a Struct."""
    return field(1, field(1, namespace.encode()) + field(2, field(5, content)))


CONTINUE_REQUEST_HEADERS: Final = b"\x0a\x00"
CONTINUE_RESPONSE_HEADERS: Final = b"\x12\x00"
CONTINUE_REQUEST_BODY: Final = b"\x1a\x00"
CONTINUE_RESPONSE_BODY: Final = b"\x22\x00"
CONTINUE_REQUEST_TRAILERS: Final = b"\x2a\x00"
CONTINUE_RESPONSE_TRAILERS: Final = b"\x32\x00"

_CLEAR_ROUTE_CACHE: Final = b"\x28\x01"


def request_body_reply(mutation: bytes, dynamic_metadata: bytes, body: bytes | None) -> bytes:
    """Continue with these header mutations, routed anew; `body` replaces the request's where it is not None."""
    if body is None:
        before, _, behind = _request_body_frame(len(mutation), -1, len(dynamic_metadata))
        return before + mutation + behind + dynamic_metadata
    # Joined at once: a body may have megabytes.
    before, before_body, behind_body = _request_body_frame(len(mutation), len(body), len(dynamic_metadata))
    return b"".join((before, mutation, before_body, body, behind_body, dynamic_metadata))


@functools.lru_cache(maxsize=4096)
def _request_body_frame(mutation_size: int, body_size: int, metadata_size: int) -> tuple[bytes, bytes, bytes]:
    """What stands before the mutation, between it and the body, and between that and the metadata."""
    mutation = _opening(2, mutation_size)
    body = b""
    if body_size >= 0:
        inner = _opening(1, body_size)
        body = _opening(3, len(inner) + body_size) + inner
    common_size = len(mutation) + mutation_size + len(body) + max(0, body_size) + len(_CLEAR_ROUTE_CACHE)
    common = _opening(1, common_size)
    before = _opening(3, len(common) + common_size) + common + mutation
    return before, body, _CLEAR_ROUTE_CACHE + _opening(8, metadata_size)


@functools.lru_cache(maxsize=4096)
def _response_headers_prefix(size: int) -> bytes:
    return field(2, field(1, field(2, b"\0" * size)))[:-size]


def response_headers_reply(mutation: bytes) -> bytes:
    """Continue with these mutations of the response's headers, of which there must be some."""
    return _response_headers_prefix(len(mutation)) + mutation


def response_body_reply(body: bytes) -> bytes:
    """Continue with `body` in place of the chunk; empty drops the chunk."""
    # An empty `body` mutation is what Envoy takes for "no mutation"; clear_body says it.
    mutation = field(1, body) if body else b"\x10\x01"
    return field(4, field(1, field(3, mutation)))


def immediate_response(status: int, mutation: bytes, body: bytes, details: str) -> bytes:
    """Answer the client ourselves. `details` is Envoy's response code detail: a stable reason, shown in access logs."""
    return field(
        7, field(1, b"\x08" + encode_varint(status)) + field(2, mutation) + field(3, body) + field(5, details.encode())
    )
