"""Chooses the tap for a response, from its headers and what its request asked for."""

from extproc.usage.body import BlindTap, JsonTap
from extproc.usage.encoded import DecodingTap
from extproc.usage.model import Api, Tap
from extproc.usage.sse import SseTap

_GZIP = {"gzip", "x-gzip"}


def make_tap(api: Api, *, stream: bool | None, content_type: str, content_encoding: str, hide_usage: bool) -> Tap:
    """A tap for one response body.

    The content type decides; `stream`, what the request asked for, only where there is none (an engine may refuse a stream in
    JSON). `hide_usage`: we asked the engine for a usage event that the client did not ask for; in force for event streams of
    chat and completions. Encodings other than gzip and deflate are not read: keep them out by `accept-encoding`.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    inner: SseTap | JsonTap
    if media_type == "text/event-stream" or (not media_type and stream):
        inner = SseTap(api, hide_usage=hide_usage)
    elif not media_type or media_type == "application/json" or media_type.endswith("+json"):
        inner = JsonTap(api)
    else:
        return BlindTap()
    encoding = content_encoding.strip().lower()
    if not encoding or encoding == "identity":
        return inner
    if encoding in _GZIP or encoding == "deflate":
        replace = hide_usage and isinstance(inner, SseTap) and api in {"chat", "completions"}
        return DecodingTap(inner, deflate=encoding == "deflate", replace=replace)
    return BlindTap()
