"""The bytes around a stream's texts: events of one frame differ in one string (and a sequence number), nothing else.

Learned from a decoded event whose text stands once in it, with nothing escaped anywhere: then that place is the text's,
and any other whole string there gives the same event with another text. So no usage, error or other key can hide in an
event that fits, whatever its text says. Strings with a unicode escape do not fit: six bytes for a character would spoil
the estimate.
"""

import re
from typing import NamedTuple

_FRAME_MAX = 4096
_number = re.compile(rb'(?<="sequence_number":)\d+').search
string_rest = re.compile(rb'(?:[^"\\\r\n]++|\\["\\/bfnrt])++"').match
"""a string from behind its opening quote through its closing one; not an empty one"""


class Frame(NamedTuple):
    """`head` text `"` `middle` [digits] `tail`; without a number, `middle` is empty and `tail` has all the rest."""

    head: bytes
    middle: bytes
    tail: bytes
    numbered: bool

    def text_bytes(self, data: bytes) -> int:
        """Length of the text if `data` fits, else 0."""
        if not (data.startswith(self.head) and data.endswith(self.tail)):
            return 0
        text = string_rest(data, len(self.head))
        if text is None:
            return 0
        stop = text.end()
        fits = self.number_fits(data, stop) if self.numbered else stop == len(data) - len(self.tail)
        return stop - len(self.head) - 1 if fits else 0

    def number_fits(self, data: bytes, stop: int) -> bool:
        """Whether `middle`, digits and `tail` follow the closing quote that ends at `stop`, and nothing else."""
        middle = self.middle
        return data.startswith(middle, stop) and data[stop + len(middle) : len(data) - len(self.tail)].isdigit()


def learn(data: bytes, text: str) -> Frame | None:
    """The frame of a decoded event, where one can be told for certain."""
    if len(data) > _FRAME_MAX or b"\\" in data or b"\n" in data:
        return None
    quoted = b'"%b"' % text.encode()
    at = data.find(quoted)
    if at < 0 or data.find(quoted, at + 1) >= 0 or string_rest(data, at + 1) is None:
        return None
    head, rest = data[: at + 1], data[at + len(quoted) :]
    number = _number(rest)
    if number is None:
        return Frame(head, b"", rest, numbered=False)
    return Frame(head, rest[: number.start()], rest[number.end() :], numbered=True)
