"""Follows a server-sent event stream, cut anywhere, and takes the usage event out where the client did not ask for it.

Almost every chunk is one whole event that differs from the one before only in its text. `feed` recognises such a chunk
by its frame (see `frame`) and counts it without decoding. Every other chunk goes the exact way: lines, events, JSON.
Both ways know an event by the same frames, hence the cut of the stream makes no difference to what is found.

Where nothing is hidden, bytes are never held back. Where the usage event is, the bytes of an incomplete event wait for
its end, at most `HOLD_MAX`: a longer event is passed on and never hidden. An event that grows beyond `EVENT_MAX` makes
the tap blind: it passes everything on and finds nothing more. Usage on an event that has choices, too, stays there.
"""

import re

from extproc.usage.events import reader
from extproc.usage.findings import Findings
from extproc.usage.frame import Frame, learn, string_rest
from extproc.usage.model import Api

EVENT_MAX = 16 * 1024 * 1024
HOLD_MAX = 64 * 1024
_CR, _LF = 13, 10
_NEVER: tuple[bytes, ...] = ()
"""startswith of an empty tuple is false"""
_NO_LENGTH = -1

# A blank line is an end of line right after another. "\r\n" is one end, so "\n" counts only after "\n".
_blank_line = re.compile(rb"\n\n|[\r\n]\r\n?").search
_line_ends = re.compile(rb"[\r\n]+").match


class SseTap(Findings):
    """A `Tap` for text/event-stream."""

    __slots__ = (
        "_blind", "_drop_lf", "_fast_at", "_fast_head", "_fast_rest", "_fast_tail", "_frame", "_hide", "_last", "_name",
        "_parts", "_raw", "_raw_head", "_read", "_shown", "_size", "_totals_at_end",
    )  # fmt: skip

    def __init__(self, api: Api, *, hide_usage: bool) -> None:
        super().__init__()
        self._read = reader(api)
        self._totals_at_end = api != "messages"
        self._hide = hide_usage and api in {"chat", "completions"}
        # The incomplete event: its pieces, their size, its last byte, and whether they were passed on already.
        self._parts: list[bytes] = []
        self._size = 0
        self._last = b""
        self._shown = True
        self._drop_lf = False
        """a hidden event ended with the chunk's last byte, a CR: an LF that follows belongs to it"""
        self._blind = False
        # The frame in an event's data, with the event's name, and around it in the raw bytes.
        self._frame: Frame | None = None
        self._name = b""
        self._raw: Frame | None = None
        self._raw_head: bytes | tuple[bytes, ...] = _NEVER
        # The raw frame once more, flat, for `feed`; its head matches only while no event is open.
        self._fast_head: bytes | tuple[bytes, ...] = _NEVER
        self._fast_tail = b""
        self._fast_at = 0
        self._fast_rest = 0

    def feed(self, chunk: bytes, end: bool) -> bytes | None:
        """One piece of the body; None passes it on as it is."""
        if not end and chunk.startswith(self._fast_head) and chunk.endswith(self._fast_tail):
            text = string_rest(chunk, self._fast_at)
            if text is not None:
                stop = text.end()
                # NOTE: _fast_rest is negative for numbered frames, so the first comparison fails for them.
                if stop == len(chunk) - self._fast_rest or (
                    self._fast_rest < 0 and self._raw is not None and self._raw.number_fits(chunk, stop)
                ):
                    self.events += 1
                    self.text_bytes += stop - self._fast_at - 1
                    return None
        return self._follow(chunk, end)

    def dispensable(self) -> bool:
        """No event waits for its end."""
        return (self._shown or not self._size) and not self._drop_lf

    def _follow(self, chunk: bytes, end: bool) -> bytes | None:
        """The exact way."""
        if self._blind:
            return None
        if self._size and not end and not _has_end(self._last + chunk):
            return self._wait(chunk)
        buffer, start, position = chunk, 0, 0
        if self._size:
            buffer = b"".join((*self._parts, chunk))
            start = self._size if self._shown else 0
        elif self._drop_lf and chunk:
            self._drop_lf = False
            start = position = 1 if chunk[0] == _LF else 0
        out: list[bytes] = []
        length = len(buffer)
        any_ends = b"\r" in buffer
        while position < length:
            if buffer[position] in b"\r\n":
                blank = _line_ends(buffer, position)
                position = blank.end() if blank is not None else position + 1
                continue
            stop = _event_end(buffer, position, any_ends)
            if stop < 0:
                if not end:
                    break
                stop = length
            if stop - position > EVENT_MAX:
                self._blind = True
                position = length
                break
            raw = buffer[position:stop]
            text_bytes = self._raw.text_bytes(raw) if self._raw is not None else 0
            if text_bytes:
                self.events += 1
                self.text_bytes += text_bytes
            elif self._event(raw) and stop - position <= HOLD_MAX:
                out.append(buffer[start:position])
                start = stop
                self._drop_lf = stop == length and buffer[-1] == _CR
            position = stop
        stop = position + self._keep(buffer[position:])
        if end and self.usage is not None and self._totals_at_end:
            self.final = True
        if not out and stop == length and length - start == len(chunk):
            return None
        out.append(buffer[start:stop])
        return b"".join(out)

    def _keep(self, rest: bytes) -> int:
        """Remember the incomplete event; returns how many of its bytes go out now."""
        self._size = len(rest)
        self._parts = [rest] if rest else []
        self._last = rest[-1:]
        self._shown = not self._hide or self._size > HOLD_MAX
        if self._size > EVENT_MAX:
            self._go_blind()
        self._fast_head = _NEVER if self._size or self._drop_lf or self._blind else self._raw_head
        return len(rest) if self._shown else 0

    def _wait(self, chunk: bytes) -> bytes | None:
        """More of an event that is still incomplete."""
        if not chunk:
            return None
        self._parts.append(chunk)
        self._size += len(chunk)
        self._last = chunk[-1:]
        out = None if self._shown else b""
        if not self._shown and self._size > HOLD_MAX:
            self._shown = True
            out = b"".join(self._parts)
        if self._size > EVENT_MAX:
            self._go_blind()
        return out

    def _go_blind(self) -> None:
        self._blind = True
        self._parts = []
        self._size = 0
        self._fast_head = _NEVER

    def _event(self, raw: bytes) -> bool:
        """Read one event; true if the client must not see it."""
        name, values = b"", []
        for line in raw.splitlines():
            if line.startswith(b"data"):
                if line[4:6] == b": ":
                    values.append(line[6:])
                elif line[4:5] == b":":
                    values.append(line[5:])
                elif len(line) == 4:
                    values.append(b"")
            elif line.startswith(b"event:"):
                name = line[6:].removeprefix(b" ")
        if not values:
            return False
        data = values[0] if len(values) == 1 else b"\n".join(values)
        if data == b"[DONE]":
            self.done = True
            self.final = self.final or (self.usage is not None and self._totals_at_end)
            return False
        frame = self._frame
        if frame is not None and name == self._name:
            text_bytes = frame.text_bytes(data)
            if text_bytes:
                self.events += 1
                self.text_bytes += text_bytes
                return False
        reading = self._read(self, name, data)
        if reading.text:
            self._learn(raw, name, data, reading.text)
        return self._hide and reading.usage_only

    def _learn(self, raw: bytes, name: bytes, data: bytes, text: str) -> None:
        frame = learn(data, text)
        if frame is None:
            return
        self._frame, self._name = frame, name
        self._raw, self._raw_head = None, _NEVER
        for ends in (b"\n\n", b"\r\n\r\n"):
            if raw.endswith(data + ends):
                before = raw[: len(raw) - len(data) - len(ends)]
                self._raw = Frame(before + frame.head, frame.middle, frame.tail + ends, frame.numbered)
                self._raw_head = self._raw.head
                self._fast_tail = self._raw.tail
                self._fast_at = len(self._raw.head)
                self._fast_rest = _NO_LENGTH if frame.numbered else len(self._raw.tail)


def _event_end(buffer: bytes, position: int, any_ends: bool) -> int:
    """Where the event that begins at `position` ends, its blank line included; negative where it is incomplete."""
    if any_ends:
        blank = _blank_line(buffer, position)
        return blank.end() if blank is not None else -1
    stop = buffer.find(b"\n\n", position)
    return stop + 2 if stop >= 0 else -1


def _has_end(seam: bytes) -> bool:
    return b"\n\n" in seam or (b"\r" in seam and _blank_line(seam) is not None)
