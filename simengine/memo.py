"""Memo: plain answers of an engine without latency, kept by request body.

Load generators send the same bytes over and over; the second time only the id and the second of creation are new. An
answer is rendered once a second with a placeholder for its id. Used only where nothing else can change an answer: no
latency, no faults, no prefix cache.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from simengine.answers.plan import Answer, Plan

# The inside of a JSON string holds no NUL byte: it cannot clash with text.
PLACEHOLDER = b"\x00id\x00"
_MAX_ENTRIES = 1024
_MAX_BODY_BYTES = 32 * 1024


class Remembered(NamedTuple):
    created_s: int
    parts: list[bytes]
    """the body, split where the id belongs"""
    prompt_tokens: int
    completion_tokens: int
    ending: str

    def body(self, request_id: bytes) -> bytes:
        return request_id.join(self.parts)


class Memo:
    """Bounded by forgetting everything when full: cheap, and right for a few hot bodies as for none."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[bytes, Remembered] = {}

    def find(self, body: bytes) -> Remembered | None:
        """The answer to this body, if it was rendered within this second."""
        known = self._kept.get(body)
        return known if known is not None and known.created_s == int(time.time()) else None

    def keep(self, body: bytes, plan: Plan, answer_type: Callable[[Plan], Answer]) -> None:
        """Remember the answer to `body`."""
        if len(body) > _MAX_BODY_BYTES:
            return
        if len(self._kept) >= _MAX_ENTRIES:
            self._kept.clear()
        self._kept[body] = Remembered(
            plan.created_s,
            answer_type(replace(plan, request_id=PLACEHOLDER)).whole().split(PLACEHOLDER),
            plan.prompt_tokens,
            plan.completion_tokens,
            plan.choices[0].finish_reason.decode(),
        )
