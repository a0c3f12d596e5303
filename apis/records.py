"""Policy records on the wire: their bytes, and a checksum by which two sides prove that they hold the same state.

A record's bytes are msgpack with fields by name, so that either side may know fields that the other does not. The
checksum of a state is the sum of its records' hashes modulo 2^256: any order gives the same, and one change costs one
addition and one subtraction, whatever the size of the state.
"""

import hashlib
from typing import Final, TypeAlias

import msgspec

from apis.policy import Endpoint, Quota, Token
from apis.wire import snapshot_pb2 as wire

Record: TypeAlias = Token | Quota | Endpoint
Place: TypeAlias = tuple[int, str, str]
"""(wire.Kind, namespace, name)"""

TOKEN: Final = int(wire.KIND_TOKEN)
QUOTA: Final = int(wire.KIND_QUOTA)
ENDPOINT: Final = int(wire.KIND_ENDPOINT)
CHECKSUM_BYTES: Final = 32
METHOD: Final = "/arks.snapshot.v1.PolicyService/Follow"
REPORT_METHOD: Final = "/arks.snapshot.v1.PolicyService/Report"

_MODULUS: Final = 1 << (8 * CHECKSUM_BYTES)
_encoder = msgspec.msgpack.Encoder()
_decoders: Final[dict[int, msgspec.msgpack.Decoder[Record]]] = {
    TOKEN: msgspec.msgpack.Decoder(Token),
    QUOTA: msgspec.msgpack.Decoder(Quota),
    ENDPOINT: msgspec.msgpack.Decoder(Endpoint),
}


def place_of(record: Record) -> Place:
    kind = TOKEN if isinstance(record, Token) else QUOTA if isinstance(record, Quota) else ENDPOINT
    return (kind, record.namespace, record.name)


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(kind: int, payload: bytes) -> Record:
    """Raises msgspec.DecodeError or KeyError for what is none of the known kinds' records."""
    return _decoders[kind].decode(payload)


def hash_of(place: Place, payload: bytes) -> int:
    """Names hold neither NUL nor slash, so the parts cannot run into each other."""
    head = f"{place[0]}\0{place[1]}\0{place[2]}\0".encode()
    return int.from_bytes(hashlib.sha256(head + payload).digest())


def added(checksum: int, fresh: int, stale: int = 0) -> int:
    """The checksum after a record's hash went from `stale` to `fresh`; 0 stands for no record."""
    return (checksum + fresh - stale) % _MODULUS


def checksum_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(CHECKSUM_BYTES)
