"""The last good policy in the state folder, so that extproc serves after a restart while the controller is away.

One file, mode 0600, replaced by rename: the parts of a whole state as the stream sends them, each behind its length, so
that what is read is checked as what is told. It holds digests, no secrets. Its time of modification is the last moment
at which the policy was known to be true. Both functions are for a thread.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from apis import records
from apis.policy import Policy
from apis.records import Record
from apis.wire.snapshot_pb2 import Part
from apis.wire.snapshot_pb2 import Record as WireRecord
from extproc.snapshot.breath import Breath
from extproc.snapshot.replica import GapError, Replica

FILE: Final = "policy.snapshot"
_MAGIC: Final = b"arks policy 1\n"
_PART_RECORDS: Final = 64
_LENGTH: Final = 4


def save(path: Path, policy: Policy, confirmed_at_s: float) -> None:
    """Raises OSError; the file from before then stays."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(_MAGIC)
        for part in _parts(policy):
            file.write(len(part).to_bytes(_LENGTH) + part)
        file.flush()
        os.fsync(file.fileno())
    os.utime(fresh, (confirmed_at_s, confirmed_at_s))
    fresh.replace(path)


def load(path: Path) -> tuple[Policy, float]:
    """The policy, and the Unix time at which it was last known to be true.

    Raises:
        OSError: the file cannot be read, or there is none.
        ValueError: it is not what `save` wrote.
    """
    confirmed_at_s = path.stat().st_mtime
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError("is not a kept policy")
    replica, at = Replica(), len(_MAGIC)
    try:
        while True:
            length = int.from_bytes(data[at : at + _LENGTH])
            at += _LENGTH
            if not length or at + length > len(data):
                raise ValueError("is cut short")
            if replica.part(Part.FromString(data[at : at + length])):
                break
            at += length
    except (GapError, DecodeError) as error:
        raise ValueError(str(error)) from None
    if replica.rejected:
        raise ValueError("holds records of another version")
    return replica.policy, confirmed_at_s


def _parts(policy: Policy) -> Iterator[bytes]:
    """Written in small steps: the loop's thread wants to run meanwhile."""
    every: list[Record] = [*policy.tokens.values(), *policy.quotas.values(), *policy.endpoints.values()]
    breath, checksum = Breath(), 0
    for begin in range(0, max(len(every), 1), _PART_RECORDS):
        told = []
        for record in every[begin : begin + _PART_RECORDS]:
            place, payload = records.place_of(record), records.encode(record)
            checksum = records.added(checksum, records.hash_of(place, payload))
            kind, namespace, name = place
            told.append(WireRecord(kind=kind, namespace=namespace, name=name, payload=payload))  # type: ignore[arg-type]
            breath()
        last = begin + _PART_RECORDS >= len(every)
        part = Part(generation=1, records=told, last=last, checksum=records.checksum_bytes(checksum) if last else b"")
        yield part.SerializeToString()
