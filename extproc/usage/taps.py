"""Chooses the tap for a response, from its headers and what its request asked for."""

import functools

from extproc.usage.body import BlindTap, JsonTap
from extproc.usage.encoded import DecodingTap
from extproc.usage.model import Api, Tap
from extproc.usage.sse import SseTap

_GZIP = {"gzip", "x-gzip"}


@functools.lru_cache(maxsize=256)
def _read_headers(content_type: str, content_encoding: str) -> tuple[str, str]:
    """The body's kind (sse, json, unread; empty where nothing is said) and encoding (gzip, deflate, other)."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "text/event-stream":
        kind = "sse"
    elif media_type == "application/json" or media_type.endswith("+json"):
        kind = "json"
    else:
        kind = "unread" if media_type else ""
    encoding = content_encoding.strip().lower()
    if encoding in _GZIP:
        return kind, "gzip"
    if encoding == "deflate":
        return kind, encoding
    return kind, "other" if encoding and encoding != "identity" else ""


def make_tap(api: Api, *, stream: bool | None, content_type: str, content_encoding: str, hide_usage: bool) -> Tap:
    """A tap for one response body.

    The content type decides; `stream`, what the request asked for, only where there is none (an engine may refuse a
    stream in JSON). `hide_usage`: we asked the engine for a usage event that the client did not ask for; in force for
    event streams of chat and completions. Encodings other than gzip and deflate are not read: keep them out by
    `accept-encoding`.
    """
    kind, encoding = _read_headers(content_type, content_encoding)
    if kind == "unread" or encoding == "other":
        return BlindTap()
    hide_usage = hide_usage and api in {"chat", "completions"}
    inner: SseTap | JsonTap
    if kind == "sse" or (stream and not kind):
        inner = SseTap(api, hide_usage=hide_usage)
    else:
        inner = JsonTap(api)
        hide_usage = False
    return DecodingTap(inner, deflate=encoding == "deflate", replace=hide_usage) if encoding else inner
