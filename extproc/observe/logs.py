"""Logs: one line per event on stderr, JSON for machines, coloured text on a terminal.

No secret and no body ever belongs into a log call; `redact` is the net below that rule, for what slips in through a
library's message or a foreign mapping: fields with telling names lose their value, bearer tokens in text too.
A token's *resource name* is logged as `token_name`.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO, TypeAlias, cast

import structlog

LogFormat: TypeAlias = Literal["auto", "json", "console"]
FORMATS = ("auto", "json", "console")
LEVELS = ("debug", "info", "warning", "error")
REDACTED = "[redacted]"

_SECRET_FIELDS = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "chunk",
        "content",
        "cookie",
        "input",
        "messages",
        "password",
        "prompt",
        "request_body",
        "response_body",
        "secret",
        "set_cookie",
        "token",
        "x_api_key",
    }
)
_SECRET_TEXT = re.compile(r"(?i)\b(bearer\s+|x-api-key['\"]?\s*[:=]\s*['\"]?|sk-)[^\s'\",;}]+")


class Lasting:
    """stderr, whose reader may go away (`... 2>&1 | tee log`): what is written then is lost, and nothing ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            forget_stderr()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            forget_stderr()

    def isatty(self) -> bool:
        return self._stream.isatty()


def forget_stderr() -> None:
    """From now on it goes nowhere: what is still buffered must not fail again at the interpreter's end."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


def configure_logging(level: str = "info", log_format: LogFormat = "auto", stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's events to `stream` (stderr). Call once, at the process's start."""
    out = stream or cast("TextIO", Lasting(sys.stderr))
    console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if console else structlog.processors.JSONRenderer()
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries say at `info` what nobody asked for.
    root.setLevel(max(number, logging.WARNING))


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Structlog processor: take secrets' values out of an event."""
    for key, value in event.items():
        event[key] = _clean(key, value)
    return event


def scrub(text: str) -> str:
    """The text without anything that looks like a credential."""
    return _SECRET_TEXT.sub(lambda found: found.group(1) + REDACTED, text)


def _clean(key: object, value: Any) -> Any:
    if isinstance(key, str | bytes):
        name = (key.decode("latin-1") if isinstance(key, bytes) else key).lower().replace("-", "_")
        if name in _SECRET_FIELDS:
            return REDACTED
    if isinstance(value, bytes):
        return scrub(value.decode("latin-1"))
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {inner: _clean(inner, content) for inner, content in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(None, content) for content in value]
    if isinstance(value, BaseException):
        return scrub(f"{type(value).__name__}: {value}")
    return value
