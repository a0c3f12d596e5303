"""The follower's copy of the publisher's state: what was told is checked, and becomes a policy.

A whole state is collected apart and takes effect with its last part; a change must be the next one. After either the
checksum must be the publisher's. What does not fit raises `GapError`: the follower asks anew, the policy stays.
Records that did not change keep their identity, so that whoever follows sees a change by it.

A publisher of a later version may tell kinds that are not known here: they count in the checksum and for nothing else.
A record that cannot be read is left out (a token is then refused) and named in `rejected`; the others take effect.
"""

from typing import Any

import msgspec

from apis import records
from apis.policy import EMPTY, Endpoint, Key, Policy, Quota, Token
from apis.records import ENDPOINT, QUOTA, TOKEN, Place, Record
from apis.wire.snapshot_pb2 import Change, Part, Pulse
from apis.wire.snapshot_pb2 import Record as WireRecord


class GapError(Exception):
    """What was told does not follow from what is known."""


class _State:
    """One whole state, or one on its way."""

    __slots__ = ("checksum", "hashes", "rejected", "tables", "touched")

    def __init__(self) -> None:
        self.checksum = 0
        self.rejected: dict[Place, str] = {}
        self.touched: set[int] = {TOKEN, QUOTA, ENDPOINT}
        """kinds that have changed since the last policy"""
        self.hashes: dict[Place, int] = {}
        self.tables: dict[int, dict[Key, Any]] = {TOKEN: {}, QUOTA: {}, ENDPOINT: {}}

    def put(self, place: Place, payload: bytes, record: Record | None) -> None:
        """`record` None: there is none, or none that can be read."""
        before = self.hashes.pop(place, 0)
        now = 0
        if payload:
            now = self.hashes[place] = records.hash_of(place, payload)
        self.checksum = records.added(self.checksum, now, before)
        table = self.tables.get(place[0])
        if table is None:
            return
        self.touched.add(place[0])
        self.rejected.pop(place, None)
        if record is None:
            table.pop((place[1], place[2]), None)
        else:
            table[place[1], place[2]] = record


class Replica:
    """`policy` is what is in force; a new object after each change, sharing all records that stayed."""

    def __init__(self) -> None:
        self.policy: Policy = EMPTY
        self.epoch = ""
        self.generation = 0
        self._state = _State()
        self._coming: _State | None = None
        self._coming_from = ("", 0)

    @property
    def checksum(self) -> bytes:
        return records.checksum_bytes(self._state.checksum)

    @property
    def rejected(self) -> dict[Place, str]:
        """Records that could not be read, and why."""
        return self._state.rejected

    @property
    def complete(self) -> bool:
        """Whether nothing is half told."""
        return self._coming is None

    def forget(self) -> None:
        """Ask for everything next time; the policy stays."""
        self.epoch, self.generation = "", 0
        self._coming = None

    def abandon(self) -> None:
        """A stream ended: what it told by half is void, what it told whole stays a place to go on from."""
        self._coming = None

    def part(self, part: Part) -> bool:
        """Take a part of the whole state; True with the last, when it is in force.

        Raises:
            GapError: a part of another state than the one under way, or a state that does not add up.
        """
        place = (part.epoch, part.generation)
        if self._coming is None:
            self._coming, self._coming_from = _State(), place
        elif place != self._coming_from:
            raise GapError("parts of two states are mixed")
        for told in part.records:
            self._take(self._coming, told)
        if not part.last:
            return False
        state, self._coming = self._coming, None
        if records.checksum_bytes(state.checksum) != part.checksum:
            raise GapError("the whole state does not add up to its checksum")
        self._state = state
        self.epoch, self.generation = place
        self._renew()
        return True

    def change(self, change: Change) -> None:
        """Take the next change; it is in force.

        Raises:
            GapError: it is not the next one, or what it leads to does not add up.
        """
        if self._coming is not None or not self.epoch or change.generation != self.generation + 1:
            raise GapError(f"generation {change.generation} does not follow {self.generation}")
        for told in change.records:
            self._take(self._state, told)
        self.generation = change.generation
        if self.checksum != change.checksum:
            raise GapError(f"generation {change.generation} does not add up to its checksum")
        self._renew()

    def agrees(self, pulse: Pulse) -> bool:
        """Whether the publisher's state is ours."""
        return bool(pulse.generation == self.generation and pulse.checksum == self.checksum)

    def _take(self, state: _State, told: WireRecord) -> None:
        place = (int(told.kind), told.namespace, told.name)
        if not told.payload or place[0] not in state.tables:
            state.put(place, told.payload, None)
            return
        try:
            record = records.decode(place[0], told.payload)
            wrong = "" if records.place_of(record) == place else "the record is another one's"
        except msgspec.DecodeError as error:
            wrong = str(error)
        if wrong:
            state.put(place, told.payload, None)
            state.rejected[place] = wrong
            return
        known = self._table(place[0]).get((place[1], place[2]))
        state.put(place, told.payload, known if known == record and known is not None else record)

    def _table(self, kind: int) -> dict[Key, Any]:
        tables: dict[int, dict[Key, Any]] = {
            TOKEN: self.policy.tokens,
            QUOTA: self.policy.quotas,
            ENDPOINT: self.policy.endpoints,
        }
        return tables[kind]

    def _renew(self) -> None:
        """Copies of the tables that changed: a policy never changes."""
        tables, touched, old = self._state.tables, self._state.touched, self.policy
        tokens: dict[Key, Token] = dict(tables[TOKEN]) if TOKEN in touched else old.tokens
        quotas: dict[Key, Quota] = dict(tables[QUOTA]) if QUOTA in touched else old.quotas
        endpoints: dict[Key, Endpoint] = dict(tables[ENDPOINT]) if ENDPOINT in touched else old.endpoints
        touched.clear()
        self.policy = Policy(tokens, quotas, endpoints)
