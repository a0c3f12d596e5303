"""The state that followers follow: records, generation, checksum, and the changes of late.

One per publisher, written by it alone, on the event loop. A follower holds a cursor (a generation); `since` gives it
what came after, as bytes made once for all of them, or nothing where that is no longer kept: then it gets `parts`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from apis import records
from apis.records import Place, Record
from apis.wire.snapshot_pb2 import Change, FollowResponse, Part, Pulse
from apis.wire.snapshot_pb2 import Record as WireRecord

PART_RECORDS: Final = 128
"""decoded by the follower at one go: a millisecond or two of its loop"""
KEPT_BYTES: Final = 4 << 20
"""of changes of late; whoever is further behind gets the whole state"""


class Feed:
    """`epoch` tells this state's generations from those of any other publisher."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(8)
        self.generation = 0
        self.checksum = 0
        self.load = b""
        """the latest Load as a whole response"""
        self.load_number = 0
        self._records: dict[Place, bytes] = {}
        self._hashes: dict[Place, int] = {}
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._wakers: set[asyncio.Event] = set()

    def __len__(self) -> int:
        return len(self._records)

    # -- writing --------------------------------------------------------------------------------------------------

    def change(self, changes: Iterable[tuple[Place, Record | None]]) -> bool:
        """Take them over as one generation; False where they say what was known. At most PART_RECORDS of them."""
        told: list[WireRecord] = []
        for place, record in changes:
            payload = b"" if record is None else records.encode(record)
            if self._records.get(place, b"") == payload:
                continue
            before = self._hashes.pop(place, 0)
            if payload:
                now = records.hash_of(place, payload)
                self._records[place], self._hashes[place] = payload, now
            else:
                now = 0
                del self._records[place]
            self.checksum = records.added(self.checksum, now, before)
            told.append(_wire(place, payload))
        if not told:
            return False
        self.generation += 1
        self._keep(Change(generation=self.generation, records=told, checksum=records.checksum_bytes(self.checksum)))
        self._wake()
        return True

    def tell_load(self, response: bytes) -> None:
        self.load = response
        self.load_number += 1
        self._wake()

    def _keep(self, change: Change) -> None:
        kept = FollowResponse(change=change).SerializeToString()
        self._kept.append(kept)
        self._kept_bytes += len(kept)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()

    # -- reading --------------------------------------------------------------------------------------------------

    def waker(self) -> asyncio.Event:
        """Set at every change; hand it back with `forget`."""
        found = asyncio.Event()
        self._wakers.add(found)
        return found

    def forget(self, waker: asyncio.Event) -> None:
        self._wakers.discard(waker)

    @property
    def followers(self) -> int:
        return len(self._wakers)

    def knows(self, epoch: str, generation: int, checksum: bytes) -> bool:
        """Whether changes alone can bring a follower from there to here."""
        if epoch != self.epoch or self.since(generation) is None:
            return False
        return generation != self.generation or checksum == records.checksum_bytes(self.checksum)

    def since(self, generation: int) -> list[bytes] | None:
        """The changes after `generation`; None where it is from another life or too long ago."""
        missing = self.generation - generation
        if missing < 0 or missing > len(self._kept):
            return None
        return [self._kept[index] for index in range(len(self._kept) - missing, len(self._kept))]

    def parts(self) -> Iterator[bytes]:
        """The whole state as it is now, however long the reading takes."""
        held = list(self._records.items())
        generation, checksum = self.generation, records.checksum_bytes(self.checksum)
        for begin in range(0, max(len(held), 1), PART_RECORDS):
            last = begin + PART_RECORDS >= len(held)
            piece = Part(
                epoch=self.epoch,
                generation=generation,
                records=[_wire(place, payload) for place, payload in held[begin : begin + PART_RECORDS]],
                last=last,
                checksum=checksum if last else b"",
            )
            yield FollowResponse(part=piece).SerializeToString()

    def pulse(self, view_age_s: float) -> bytes:
        pulse = Pulse(
            generation=self.generation,
            checksum=records.checksum_bytes(self.checksum),
            view_age_s=view_age_s,
            ready=True,
        )
        return FollowResponse(pulse=pulse).SerializeToString()


def _wire(place: Place, payload: bytes) -> WireRecord:
    kind, namespace, name = place
    return WireRecord(kind=kind, namespace=namespace, name=name, payload=payload)  # type: ignore[arg-type]
