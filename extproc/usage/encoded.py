"""Taps for compressed bodies: decoded beside the stream, in bounded steps, or in its place to hide an event."""

import zlib

from extproc.usage.body import JsonTap
from extproc.usage.findings import Findings
from extproc.usage.sse import SseTap

_STEP_BYTES = 256 * 1024
"""decoded at once: a small chunk may hold a thousand times its size"""
_GZIP, _ZLIB, _RAW = 31, 15, -15


class DecodingTap(Findings):
    """Feeds the decoded body to another tap and shows what that one finds.

    With `replace`, the decoded bytes go out, less the hidden event (`decodes` tells the caller to drop
    content-encoding). A body that does not decode fails as `engine_bad_encoding`; from there its bytes pass untouched.
    """

    __slots__ = ("_decoder", "_deflate", "_inner", "_start")

    def __init__(self, inner: SseTap | JsonTap, *, deflate: bool, replace: bool) -> None:
        super().__init__()
        self._inner = inner
        self._deflate = deflate
        self.decodes = replace
        self._decoder = None if deflate else zlib.decompressobj(_GZIP)
        self._start = b""
        """the first byte of a deflate body, until the second tells zlib's header from none"""

    def feed(self, chunk: bytes, end: bool) -> bytes | None:
        """One piece of the encoded body."""
        if self.error == "engine_bad_encoding":
            return None
        out: list[bytes] = []
        try:
            self._decode(chunk, out)
        except zlib.error:
            self._show()
            self.error = "engine_bad_encoding"
            out.append(chunk)
            return b"".join(out) if self.decodes else None
        if end:
            self._pass(b"", out, end=True)
        self._show()
        return b"".join(out) if self.decodes else None

    def _decode(self, data: bytes, out: list[bytes]) -> None:
        if self._decoder is None:
            data = self._start + data
            if len(data) < 2:
                self._start = data
                return
            is_zlib = data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
            self._decoder = zlib.decompressobj(_ZLIB if is_zlib else _RAW)
        while data:
            self._pass(self._decoder.decompress(data, _STEP_BYTES), out, end=False)
            if self._decoder.eof:
                # gzip bodies may have several members; what is no member behind the last one is padding
                data = self._decoder.unused_data
                if self._deflate or not data.startswith(b"\x1f"):
                    return
                self._decoder = zlib.decompressobj(_GZIP)
            else:
                data = self._decoder.unconsumed_tail

    def _pass(self, plain: bytes, out: list[bytes], *, end: bool) -> None:
        passed = self._inner.feed(plain, end)
        if self.decodes:  # or nobody wants it: what a chunk decodes to may be a thousand times its size
            out.append(plain if passed is None else passed)

    def _show(self) -> None:
        inner = self._inner
        self.usage, self.error, self.started = inner.usage, inner.error, inner.started
        self.done, self.final = inner.done, inner.final

    def dispensable(self) -> bool:
        """What was begun decoded must be decoded to its end."""
        return not self.decodes

    def delivered_tokens(self) -> int:
        """As the inner tap estimates."""
        return self._inner.delivered_tokens()
