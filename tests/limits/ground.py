"""What the tests of limits share: a clock they turn, rules, records."""

from extproc.ledger.model import UsageRecord
from extproc.limits.model import Amounts, Lease, Refusal, Rule

NOON = 1_800_000_000 - 1_800_000_000 % 86_400 + 43_200


class Clock:
    def __init__(self, now_s: float = NOON) -> None:
        self.now_s = float(now_s)

    def __call__(self) -> float:
        return self.now_s


def rpm(limit: int, key: str = "rate/ns/token/model/rpm") -> Rule:
    return Rule(key, "rpm", "requests", limit, 60)


def rpd(limit: int, key: str = "rate/ns/token/model/rpd") -> Rule:
    return Rule(key, "rpd", "requests", limit, 86_400)


def tpm(limit: int, key: str = "rate/ns/token/model/tpm") -> Rule:
    return Rule(key, "tpm", "total", limit, 60)


def tpd(limit: int, key: str = "rate/ns/token/model/tpd") -> Rule:
    return Rule(key, "tpd", "total", limit, 86_400)


def quota(limit: int, kind: str = "total") -> Rule:
    return Rule(f"quota/ns/basic/{kind}", kind, kind, limit, 0)  # type: ignore[arg-type]


def concurrency(limit: int, key: str = "concurrency/ns/token") -> Rule:
    return Rule(key, "concurrency", "concurrent", limit, 0)


def admitted(outcome: Lease | Refusal) -> Lease:
    assert isinstance(outcome, Lease), outcome
    return outcome


def refused(outcome: Lease | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    return outcome


def record(name: str = "r1", **changes: object) -> UsageRecord:
    fields: dict[str, object] = {
        "id": name, "attempt": 1, "request_id": f"x-{name}", "time_ms": NOON * 1000, "token": "example-token",
        "namespace": "default", "model": "qwen-7b", "endpoint": "qwen-7b", "engine": "10.0.0.1:8000", "status": 200,
        "prompt_tokens": 12, "completion_tokens": 34, "cached_tokens": 5, "reasoning_tokens": 6, "accuracy": "exact",
        "stream": True, "duration_ms": 789, "ttft_ms": 56, "error": "",
    }  # fmt: skip
    return UsageRecord(**{**fields, **changes})  # type: ignore[arg-type]


ONE = Amounts(1, 10, 90)
NOTHING = Amounts(0, 0, 0)
