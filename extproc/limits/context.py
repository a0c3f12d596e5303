"""What travels with a lease: the usage row as far as it is known at admission, for the case that nobody settles it."""

from typing import Any

import msgspec

from extproc.ledger.model import LEASE_EXPIRED, UsageRecord
from extproc.limits.model import Amounts

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Any])


def encode_context(record: UsageRecord) -> bytes:
    """By position: names would double what every open lease costs on disk. New fields go to the end, with a default."""
    return _ENCODER.encode(msgspec.structs.astuple(record))


def decode_context(context: bytes) -> UsageRecord:
    """Raises msgspec.MsgspecError."""
    return msgspec.convert(
        dict(zip(UsageRecord.__struct_fields__, _DECODER.decode(context), strict=False)), UsageRecord
    )


def expired_record(context: bytes, amounts: Amounts, now_s: float) -> UsageRecord:
    """The row of a lease that ended unsettled: charged as reserved. Raises msgspec.MsgspecError."""
    record = decode_context(context)
    return msgspec.structs.replace(
        record,
        status=0,
        prompt_tokens=amounts.prompt,
        completion_tokens=amounts.response,
        accuracy="estimated",
        duration_ms=max(0, int(now_s * 1000) - record.time_ms),
        error=LEASE_EXPIRED,
    )
