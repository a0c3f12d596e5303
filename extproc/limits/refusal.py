"""Whether and why a request does not fit, for a plan that is bound, and none of whose counters holds it."""

from extproc.limits.meter import CONCURRENT
from extproc.limits.model import Refusal
from extproc.limits.plan import Asked, Plan

CONCURRENT_RETRY_S = 1.0
"""nobody knows when a slot comes free"""


def refusal(plan: Plan, asked: Asked, now: float) -> Refusal | None:
    """Names the first rule, in the caller's order, that does not fit. The standings are as they are."""
    for rule, (counter, _, unit) in zip(plan.rules, plan.checks, strict=True):
        takes = asked[unit]
        if not takes:
            continue
        used = counter.taken
        if used + takes > rule.limit:
            retry_after_s: float | None = None
            if unit == CONCURRENT:
                retry_after_s = CONCURRENT_RETRY_S
            elif counter.window_s:
                retry_after_s = counter.end_s - now
            requests, tokens = plan.reading.standings([meter.taken + full for meter, full in plan.meters], now)
            return Refusal(rule, used, takes, retry_after_s, requests, tokens)
    return None
