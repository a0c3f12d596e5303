"""What quotas have used, reported to the controller, which writes it to `status.quotaStatus` of each ArksQuota.

Beside the stream and never on a request's way: every `every_s` all quotas of the policy in force are looked at, with
the loop free in between, and those whose use the controller has not confirmed yet are sent, `PIECE` at a time. After
each new connection of the stream, which may be another life of the controller, that is all of them. While the stream
is broken nothing is sent; nothing is queued either, for the next look finds what is still to be told.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog

from apis.policy import Key, Quota
from apis.records import REPORT_METHOD
from apis.wire.snapshot_pb2 import QuotaUse, ReportRequest, ReportResponse
from extproc.snapshot.index import LiveIndex
from extproc.snapshot.stream import OPTIONS, StreamSource

EVERY_S: Final = 10.0
PIECE: Final = 128
"""quotas looked at in one go, and in one message: below 64 KiB, however long their names are"""
TIMEOUT_S: Final = 5.0
_MOST: Final = 2**63 - 1

log = structlog.get_logger("extproc")


class _Told(NamedTuple):
    quota: Quota
    """the very record: one that was deleted and made anew is another one, which the controller knows nothing of"""
    used: dict[str, int]
    """by kind"""


class QuotaReport:
    """`used`: tokens charged to a counter, by its key."""

    def __init__(
        self, source: StreamSource, live: LiveIndex, used: Callable[[str], int], *, every_s: float = EVERY_S
    ) -> None:
        self._source, self._live, self._used, self._every_s = source, live, used, every_s
        self._told: dict[Key, _Told] = {}
        self._quotas: Mapping[Key, Quota] = {}
        self._connection = 0
        self._failing = False

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            if self._source.status.ok:
                await self._report()
            await asyncio.sleep(self._every_s)

    async def _report(self) -> None:
        if self._connection != self._source.connections:
            self._connection = self._source.connections
            self._told.clear()
        changed = await self._changed()
        if not changed:
            return
        try:
            await self._send(changed)
        except grpc.aio.AioRpcError as error:
            if not self._failing:
                why = error.code().name.lower().replace("_", " ")
                log.warning("the use of quotas cannot be reported, trying on", reason=why, every_s=self._every_s)
            self._failing = True
        else:
            if self._failing:
                log.info("the use of quotas is reported again")
            self._failing = False

    async def _changed(self) -> list[tuple[Key, _Told]]:
        """What the controller is still to be told."""
        index = self._live.current
        quotas = index.policy.quotas
        if quotas is not self._quotas:
            self._quotas = quotas
            for key in self._told.keys() - quotas.keys():
                del self._told[key]
        found = []
        for number, (key, quota) in enumerate(quotas.items(), 1):
            used = {rule.kind: min(max(0, self._used(rule.key)), _MOST) for rule in index.quota_rules[key]}
            told = self._told.get(key)
            if told is None or told.quota is not quota or told.used != used:
                found.append((key, _Told(quota, used)))
            if not number % PIECE:
                await asyncio.sleep(0)
        return found

    async def _send(self, changed: list[tuple[Key, _Told]]) -> None:
        """Raises AioRpcError; what was confirmed before stays so."""
        async with grpc.aio.insecure_channel(self._source.address, options=OPTIONS) as channel:
            method: Any = channel.unary_unary(
                REPORT_METHOD,
                request_serializer=ReportRequest.SerializeToString,
                response_deserializer=ReportResponse.FromString,
            )
            for begin in range(0, len(changed), PIECE):
                piece = changed[begin : begin + PIECE]
                await method(ReportRequest(quotas=[_wire(key, told) for key, told in piece]), timeout=TIMEOUT_S)
                self._told.update(piece)


def _wire(key: Key, told: _Told) -> QuotaUse:
    used = told.used
    return QuotaUse(
        namespace=key[0],
        name=key[1],
        prompt=used.get("prompt"),
        response=used.get("response"),
        total=used.get("total"),
    )
