"""Which engine version an image holds, as far as its tag tells.

An image of unknown content (no tag, a digest, ``latest``, a name of the user's own) counts as current: its
owner keeps it up to date, or says otherwise with the annotation ``arks.ai/engine-version``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NUMBERS = re.compile(r"(?:^|[^0-9.])v?(\d+)\.(\d+)(?:\.(\d+))?(?=$|[^0-9])")
# Tags that name their platform before the engine: "rocm7.0.0_vllm_0.11.2_20251210".
_NAMED = re.compile(r"(?:vllm|sglang|dynamo)[-_]?v?(\d+)\.(\d+)(?:\.(\d+))?")


class Version(NamedTuple):
    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def parse_version(text: str) -> Version | None:
    """The first ``X.Y[.Z]`` in a tag, preferring one that is named after an engine."""
    found = _NAMED.search(text) or _NUMBERS.search(text)
    if found is None:
        return None
    major, minor, patch = found.groups()
    return Version(int(major), int(minor), int(patch or 0))


def image_version(image: str) -> Version | None:
    """The version in an image's tag, or None: a registry's port and a digest are no tag."""
    name = image.split("@", 1)[0].rsplit("/", 1)[-1]
    _, colon, tag = name.partition(":")
    return parse_version(tag) if colon else None


def at_least(version: Version | None, *floor: int) -> bool:
    """True when the version is unknown (then it is current) or not older than ``floor``."""
    return version is None or version >= Version(*floor)
