"""What a request's headers come to: a service, or the reason why there is none (RFC 9113 8.2, 8.3; gRPC over HTTP/2).

One `Router` serves all connections of a listener. Envoy opens stream after stream with the same few headers, and
without a dynamic table the same headers are the same octets, so routes are remembered by header block; the memory is
bounded and holds no block longer than a usual request's.

`grpc-timeout` is not acted upon: the deadline is the client's to enforce, by resetting the stream.
"""

import re
from typing import Final

from extproc.transport.core import Service, Services
from extproc.transport.hpack import DynamicTable, HeadersTooLarge, decode

MAX_HEADER_BYTES: Final = 1 << 16
"""decoded size of a request's headers, as RFC 9113 6.5.2 counts it"""
_REMEMBERED_ROUTES: Final = 512
_REMEMBERED_BLOCK_BYTES: Final = 1024
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]\Z").search
_GRPC: Final = re.compile(rb"application/grpc(?:[+; ]|\Z)").match
_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_A_CONNECTION: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)


class Malformed(Exception):  # noqa: N818 - said of the request
    """The request breaks HTTP/2's own rules: a stream error of type PROTOCOL_ERROR (RFC 9113 8.1.1)."""


class Route:
    """Where one kind of request leads: just one of `service`, `grpc_error` and `http_error` is set."""

    __slots__ = ("content_length", "grpc_error", "http_error", "service")

    def __init__(
        self,
        service: Service | None = None,
        *,
        grpc_error: tuple[int, str] | None = None,
        http_error: int = 0,
        content_length: int | None = None,
    ) -> None:
        self.service = service
        self.grpc_error = grpc_error
        self.http_error = http_error
        self.content_length = content_length
        """announced size of the request in bytes; gRPC clients announce none"""


def _validated(block: bytes, table: DynamicTable | None) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    pseudo_over = False
    for name, value in decode(block, MAX_HEADER_BYTES, table):
        if name.startswith(b":"):
            if pseudo_over or name not in _PSEUDO or name in headers:
                raise Malformed
        else:
            pseudo_over = True
            if not _NAME(name) or name in _OF_A_CONNECTION or (name == b"te" and value != b"trailers"):
                raise Malformed
            if name == b"content-length" and headers.get(name, value) != value:
                raise Malformed
        if _BAD_VALUE(value):
            raise Malformed
        headers[name] = value
    return headers


def check_trailers(block: bytes, table: DynamicTable | None) -> None:
    """Raise `Malformed` unless `block` may end a request; what it says is of no use to us."""
    try:
        if any(name.startswith(b":") for name in _validated(block, table)):
            raise Malformed
    except HeadersTooLarge:
        raise Malformed from None


class Router:
    """Header block → `Route`, by `services` (`:path` → maker of calls)."""

    def __init__(self, services: Services) -> None:
        self._services = {path.encode(): service for path, service in services.items()}
        self.known: dict[bytes, Route] = {}
        """routes by header block, for peers without a dynamic table"""

    def route(self, block: bytes, table: DynamicTable | None) -> Route:
        """Raises `Malformed`, `HpackError`."""
        route = self._find(block, table)
        if table is None and len(block) <= _REMEMBERED_BLOCK_BYTES:
            if len(self.known) >= _REMEMBERED_ROUTES:
                self.known.clear()
            self.known[block] = route
        return route

    def _find(self, block: bytes, table: DynamicTable | None) -> Route:
        try:
            headers = _validated(block, table)
        except HeadersTooLarge:
            return Route(grpc_error=(8, "headers too large"))
        path = headers.get(b":path")
        if not path or b":method" not in headers or b":scheme" not in headers:
            raise Malformed
        length = headers.get(b"content-length")
        if length is not None and not length.isdigit():
            raise Malformed
        content_length = None if length is None else int(length[:20])
        if headers[b":method"] != b"POST":
            return Route(http_error=405, content_length=content_length)
        if not _GRPC(headers.get(b"content-type", b"")):
            return Route(http_error=415, content_length=content_length)
        service = self._services.get(path)
        if service is None:
            return Route(grpc_error=(12, "no such method"))
        return Route(service, content_length=content_length)
