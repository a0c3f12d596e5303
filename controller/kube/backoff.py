"""How long to wait before the next try: growing, capped, and never in step with other replicas."""

from __future__ import annotations

import random


def pause_s(failures: int, first_s: float, longest_s: float) -> float:
    """Wait after so many failures in a row (1 is the first): doubles from `first_s` to `longest_s`, less up to half."""
    return spread_s(0.5, 1.0) * min(longest_s, first_s * 2.0 ** min(max(failures - 1, 0), 30))


def spread_s(low_s: float, high_s: float) -> float:
    """A moment in between, so that many do not act at once."""
    return random.uniform(low_s, high_s)  # noqa: S311 - spreads load, keeps no secret
