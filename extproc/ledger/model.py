"""One usage event: what a request cost. Append-only, idempotent by (id, attempt)."""

from typing import Literal, Protocol, TypeAlias

import msgspec

from extproc.usage.model import Api

Accuracy: TypeAlias = Literal["exact", "estimated"]

LEASE_EXPIRED = "lease_expired"
"""`UsageRecord.error` of the estimate that a lease leaves behind when nobody settled it in time"""

BROKEN_OFF = "broken_off"
"""`UsageRecord.error` of a request whose answer broke off, until it is known why (about a tenth of a second)"""

GATEWAY_RESTARTED = "gateway_restarted"
"""`UsageRecord.error` of a request that outlasted a drain: charged for what it had by then, the rest went by unseen"""


class UsageRecord(msgspec.Struct, frozen=True, gc=False):
    id: str
    """ours, unique over restarts; the lease's id"""
    attempt: int
    """1, or 2 where the first engine was lost before it answered a byte"""
    request_id: str
    """x-request-id, as the client sees it"""
    time_ms: int
    """Unix time of admission, milliseconds"""
    token: str
    """the token's resource name, never its secret"""
    namespace: str
    model: str
    endpoint: str
    engine: str
    """ip:port, empty where none was reached"""
    status: int
    """what the client got, or 499 where it left; 0 where that was never seen (an expired lease, a drain)"""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    accuracy: Accuracy
    stream: bool
    duration_ms: int
    ttft_ms: int | None
    """headers of the request to the first content event; None where none came"""
    error: str = ""
    """stable reason, empty for success"""
    api: Api = "chat"


class Ledger(Protocol):
    def append(self, record: UsageRecord) -> None:
        """Queue the row; durable within 100 ms. Never blocks."""
