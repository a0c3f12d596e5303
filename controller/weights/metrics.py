"""An engine's load out of what it publishes: vLLM's, SGLang's and Dynamo's metrics pages, SGLang's /v1/loads.

Names as of vLLM 0.32, SGLang 0.5.23, Dynamo 1.6. Dynamo's are its frontend's: a request is in flight from its arrival
on and queued until its first token, nothing is said of KV usage, and before the first request nothing at all. Pages are
tens of kilobytes and read every second, so one expression picks the few lines that count. Several series of a name are
the ranks of one engine: numbers of requests add up, of KV usage the fullest counts.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final, NamedTuple

import msgspec

# Begins with a byte and not with an anchor: of a line that does not count nothing is tried, which is six times as fast.
_LINES: Final = re.compile(
    rb"\n(?:vllm:|sglang:|dynamo_frontend_)(num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    rb"|num_running_reqs|num_queue_reqs|token_usage|inflight_requests|queued_requests"
    rb"|time_to_first_token_seconds_sum|time_to_first_token_seconds_count)(?:\{[^\n]*\})? ([^\s]+)"
)
_RUNNING: Final = frozenset((b"num_requests_running", b"num_running_reqs", b"inflight_requests"))
_QUEUED: Final = b"queued_requests"
_WAITING: Final = frozenset((b"num_requests_waiting", b"num_queue_reqs", _QUEUED))
_USAGE: Final = frozenset((b"kv_cache_usage_perc", b"token_usage"))
_json = msgspec.json.Decoder().decode


class Sample(NamedTuple):
    running: int
    waiting: int
    kv_usage: float
    ttft_sum_s: float = 0.0
    ttft_count: float = 0.0


def from_page(text: bytes) -> Sample | None:
    """Of a /metrics page; None where it is no engine's."""
    running = waiting = usage = total = count = 0.0
    found = False
    for name, value in _LINES.findall(b"\n" + text):
        try:
            number = float(value)
        except ValueError:
            continue
        if not math.isfinite(number):
            continue
        if name in _RUNNING:
            running, found = running + number, True
        elif name in _WAITING:
            waiting += number
            if name == _QUEUED:
                running -= number
        elif name in _USAGE:
            usage = max(usage, number)
        elif name.endswith(b"_sum"):
            total += number
        else:
            count += number
    return Sample(int(max(0.0, running)), int(waiting), usage, total, count) if found else None


def from_loads(text: bytes) -> Sample | None:
    """Of SGLang's /v1/loads: one object, or one per data-parallel rank; None where it is neither."""
    try:
        answer = _json(text)
    except msgspec.DecodeError:
        return None
    ranks = answer.get("loads", answer) if isinstance(answer, dict) else answer
    each = [ranks] if isinstance(ranks, dict) else ranks
    if not isinstance(each, list) or not each or not all(isinstance(rank, dict) for rank in each):
        return None
    if not any("num_running_reqs" in rank for rank in each):
        return None
    return Sample(
        int(sum(_number(rank, "num_running_reqs") for rank in each)),
        int(sum(_number(rank, "num_waiting_reqs") for rank in each)),
        max(_number(rank, "token_usage") for rank in each),
    )


def _number(rank: dict[str, Any], name: str) -> float:
    value = rank.get(name, 0)
    good = isinstance(value, int | float) and math.isfinite(value)
    return max(0.0, float(value)) if good else 0.0
