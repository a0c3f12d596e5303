"""Why a request does not fit, for a plan none of whose counters holds it."""

from extproc.limits.meter import CONCURRENT
from extproc.limits.model import Refusal, Rule, Standing
from extproc.limits.plan import Asked, Check, Plan

CONCURRENT_RETRY_S = 1.0
"""nobody knows when a slot comes free"""


def refusal(plan: Plan, asked: Asked, now: float) -> Refusal:
    """Names the first rule, in the caller's order, that does not fit. The standings are as they are."""
    refusing: Rule | None = None
    retry_after_s: float | None = None
    used = takes = 0
    for rule, (counter, _, unit) in zip(plan.rules, plan.checks, strict=True):
        if now >= counter.end_s:
            counter.roll(now)
        if refusing is None and asked[unit] and counter.taken + asked[unit] > rule.limit:
            refusing, used, takes = rule, counter.taken, asked[unit]
            if unit == CONCURRENT:
                retry_after_s = CONCURRENT_RETRY_S
            elif counter.window_s:
                retry_after_s = counter.end_s - now
    assert refusing is not None
    return Refusal(
        rule=refusing,
        used=used,
        asked=takes,
        retry_after_s=retry_after_s,
        requests=_tightest(plan.requests, now),
        tokens=_tightest(plan.tokens, now),
    )


def _tightest(checks: tuple[Check, ...], now: float) -> Standing | None:
    if not checks:
        return None
    counter, limit, _ = min(checks, key=lambda check: check[1] - check[0].taken)
    return Standing(limit, max(limit - counter.taken, 0), counter.end_s - now if counter.window_s else 0.0)
