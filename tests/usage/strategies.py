"""Texts, transcripts and cuts for property tests."""

import json
from itertools import pairwise

from hypothesis import strategies as st

from extproc.usage.model import Tap, Usage
from tests.usage.transcripts import BUILDERS, Transcript

FAKES = (
    "usage",
    '"usage":{"prompt_tokens":99,"completion_tokens":99,"total_tokens":198}',
    '{"choices":[],"usage":{"prompt_tokens":99,"completion_tokens":99}}',
    'data: {"error":{"message":"x","code":500}}\n\n',
    "data: [DONE]\n\n",
    '\\"usage\\":',
    "\\",
    '"',
    "é",
    "你好",
    "🙂",
    "\r\n",
    "\u2028",
)
TEXTS = st.one_of(st.sampled_from([" the", " a", "", "token", "."]), st.sampled_from(FAKES), st.text(max_size=12))
TRANSCRIPTS = st.builds(lambda build, texts: build(texts), st.sampled_from(BUILDERS), st.lists(TEXTS, max_size=8))
ENDS_OF_LINE = st.sampled_from(["\n", "\r\n", "\r"])


def with_noise(made: Transcript, noise: list[tuple[int, list[str]]]) -> Transcript:
    """Lines that mean nothing, put in front of some events' lines."""
    for index, lines in noise:
        if index < len(made.blocks):
            made.blocks[index] = lines + made.blocks[index]
    return made


NOISE = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from([[": keep-alive"], ["id: 7"], ["retry: 10"], [":"], ["usage"], [": keep-alive", "", ""]]),
    ),
    max_size=3,
)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    """The body in pieces, cut at `places` (modulo its length); pieces may be empty."""
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[left:right] for left, right in pairwise(edges)]


CUTS = st.one_of(
    st.lists(st.integers(0, 100_000), max_size=12),
    st.integers(1, 40).map(lambda step: list(range(0, 100_000, step))),
)


def follow(tap: Tap, pieces: list[bytes], *, separate_end: bool = True) -> bytes:
    """What the client gets."""
    out = []
    for index, piece in enumerate(pieces):
        passed = tap.feed(piece, not separate_end and index == len(pieces) - 1)
        out.append(piece if passed is None else passed)
    if separate_end or not pieces:
        out.append(tap.feed(b"", True) or b"")
    return b"".join(out)


def findings(tap: Tap) -> tuple[Usage | None, str, bool, bool, bool, int]:
    return tap.usage, tap.error, tap.started, tap.done, tap.final, tap.delivered_tokens()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
