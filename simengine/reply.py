"""Plain replies, and the ways in which a plain body can be wrong."""

import gzip

from simengine.connection import Exchange
from simengine.event_stream import CutWriter
from simengine.faults import NO_FAULTS, Faults


def reply(exchange: Exchange, status: int, body: bytes, faults: Faults, extra: bytes = b"") -> None:
    """A JSON answer, through the faults that concern its bytes."""
    if faults is NO_FAULTS:
        exchange.reply(status, body, b"application/json", extra)
        return
    if faults.gzip:
        body = gzip.compress(body, compresslevel=1, mtime=0)
        extra += b"content-encoding: gzip\r\n"
    if faults.content_length_delta:
        exchange.keep_alive = False
    length = max(0, len(body) + faults.content_length_delta)
    exchange.write(exchange.head(status, b"application/json", b"content-length: %d\r\n%s" % (length, extra)))
    pieces = CutWriter(exchange.write, faults)
    pieces.write(body)
    pieces.then(exchange.end)
