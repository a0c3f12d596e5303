"""HTTP/2 frames and gRPC's framing in them: numbers, layouts, and the header blocks we ever send (RFC 9113 4, 6, 7).

Our header blocks are literals and static entries only, so they need no compression state on either side.
"""

import enum
import struct
from typing import Final
from urllib.parse import quote

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME: Final = struct.Struct(">HBBBI")
"""length in two parts (16 and 8 bits), type, flags, stream"""
FRAME_BYTES: Final = 9
PREFIX: Final = struct.Struct(">BI")
"""gRPC's prefix of each message: compressed or not, length"""
PREFIX_BYTES: Final = 5
MAX_WINDOW: Final = (1 << 31) - 1
DEFAULT_WINDOW: Final = 65535
DEFAULT_FRAME_LIMIT: Final = 16384

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITIZED: Final = 0x20

SETTINGS_HEADER_TABLE_SIZE: Final = 1
SETTINGS_ENABLE_PUSH: Final = 2
SETTINGS_MAX_CONCURRENT_STREAMS: Final = 3
SETTINGS_INITIAL_WINDOW_SIZE: Final = 4
SETTINGS_MAX_FRAME_SIZE: Final = 5
SETTINGS_MAX_HEADER_LIST_SIZE: Final = 6


class ErrorCode(enum.IntEnum):
    """RFC 9113 7"""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class ConnectionFailure(Exception):  # noqa: N818 - it carries the error, it is not one
    """The connection cannot go on: GOAWAY with `code`. `reason` goes over the wire, in fixed words of ours."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame(kind: int, flags: int, sid: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return FRAME.pack(size >> 8, size & 255, kind, flags, sid) + payload


def reset(sid: int, code: ErrorCode) -> bytes:
    return frame(RST_STREAM, 0, sid, code.to_bytes(4, "big"))


def window_update(sid: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, sid, increment.to_bytes(4, "big"))


def goaway(last_sid: int, code: ErrorCode, reason: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, last_sid.to_bytes(4, "big") + code.to_bytes(4, "big") + reason.encode())


def _literal(name: bytes, value: bytes) -> bytes:
    # Lengths stay under 127, one octet each, but for the message of a status, which is cut to fit.
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


_OK: Final = b"\x88"  # :status 200
_GRPC: Final = _literal(b"content-type", b"application/grpc")
RESPONSE: Final = _OK + _GRPC
"""what a stream's first HEADERS frame says"""


def trailers(grpc_status: int, message: str = "") -> bytes:
    """The header block of a stream's end; the message is percent-encoded and cut to 120 octets."""
    block = _literal(b"grpc-status", b"%d" % grpc_status)
    if message:
        coded = quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode()[:120]
        if b"%" in coded[-2:]:  # never half of an escape
            coded = coded[: coded.rindex(b"%")]
        block += _literal(b"grpc-message", coded)
    return block


def plain_response(status: int, text: bytes) -> bytes:
    """The header block of an answer to what is no gRPC request."""
    block = _literal(b":status", b"%d" % status) + _literal(b"content-type", b"text/plain")
    return block + _literal(b"content-length", b"%d" % len(text))


TRAILERS_OK: Final = trailers(0)

FIRST_DATA: Final = struct.Struct(f">HBBBI{len(RESPONSE)}sHBBBIBI").pack
"""HEADERS of the response and the head of a DATA frame with one whole message, in one piece"""
NEXT_DATA: Final = struct.Struct(">HBBBIBI").pack
