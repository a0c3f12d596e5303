"""`status.quotaStatus`: what extproc reports is what kubectl shows, and nothing is written without a reason."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from apis.records import REPORT_METHOD
from apis.wire.snapshot_pb2 import QuotaUse, ReportRequest, ReportResponse
from controller.app import Controller
from controller.kube.resource import Key
from controller.reconcile.spending import EVERY_S, Spending
from tests.reconcile.conftest import Room, Running, _until
from tests.reconcile.resources import QUOTA

NAME = "basic-quota"


class Reporting:
    """A controller that publishes, and the extproc beside it. `stop` and `start` are a restart."""

    def __init__(self, room: Room, folder: Path) -> None:
        self.room, self.address = room, f"unix:{folder / 'policy.sock'}"
        self.running = Running(room.api, room.namespace, policy_stream=self.address)

    @property
    def controller(self) -> Controller:
        return self.running.controller

    async def start(self) -> None:
        await self.running.start()
        await self.running.leading()
        await _until(self.controller.publisher.ready.is_set)

    async def restart(self) -> None:
        await self.running.stop()
        self.running = Running(self.room.api, self.room.namespace, policy_stream=self.address)
        await self.start()
        await self.running.quiet()

    async def report(self, name: str = NAME, **used: int) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = channel.unary_unary(
                REPORT_METHOD,
                request_serializer=ReportRequest.SerializeToString,
                response_deserializer=ReportResponse.FromString,
            )
            use = QuotaUse(namespace=self.room.namespace, name=name, **used)
            await call(ReportRequest(quotas=[use]), timeout=60)

    async def shows(self, **used: int) -> dict[str, str]:
        """Wait until kubectl shows exactly this; the times, by kind."""
        found = await self.room.until("ArksQuota", NAME, lambda item: shown(item) == used, str(used))
        return {each["type"]: each["lastUpdateTime"] for each in found["status"]["quotaStatus"]}

    async def hurry(self) -> None:
        """As if the last write, which has just been seen, were long ago."""
        await _until(lambda: self.controller.spending._written_s)
        self.controller.spending._written_s.clear()


def shown(quota: dict) -> dict[str, int]:
    return {each["type"]: each["used"] for each in quota.get("status", {}).get("quotaStatus") or ()}


@pytest.fixture
async def reporting(room: Room, tmp_path: Path) -> AsyncIterator[Reporting]:
    found = Reporting(room, tmp_path)
    await found.start()
    try:
        room.apply(QUOTA)
        await room.condition("ArksQuota", NAME, "Accepted", "True")
        yield found
    finally:
        await found.running.stop()


async def test_what_is_reported_is_shown_by_kind_with_its_time(reporting):
    began = dt.datetime.now(dt.UTC).replace(microsecond=0)
    await reporting.report(prompt=7, response=20, total=27)
    times = await reporting.shows(prompt=7, response=20, total=27)
    assert all(began <= dt.datetime.fromisoformat(at) <= dt.datetime.now(dt.UTC) for at in times.values())


async def test_the_time_of_a_kind_is_when_its_own_use_was_last_seen_to_change(reporting):
    now = ["2026-01-01T00:00:00Z"]
    reporting.controller.spending._now = lambda: now[0]
    await reporting.report(prompt=7, response=0, total=7)
    await reporting.shows(prompt=7, response=0, total=7)
    now[0] = "2026-01-01T00:00:10Z"
    await reporting.hurry()
    await reporting.report(prompt=7, response=20, total=27)
    times = await reporting.shows(prompt=7, response=20, total=27)
    assert times == {
        "prompt": "2026-01-01T00:00:00Z",
        "response": "2026-01-01T00:00:10Z",
        "total": "2026-01-01T00:00:10Z",
    }


async def test_the_same_report_again_writes_nothing(reporting, room):
    await reporting.report(prompt=7, response=20, total=27)
    await reporting.shows(prompt=7, response=20, total=27)
    await reporting.running.quiet()
    sent, version = reporting.running.writes(), room.get("ArksQuota", NAME)["metadata"]["resourceVersion"]
    await reporting.hurry()
    for _ in range(5):
        await reporting.report(prompt=7, response=20, total=27)
    await reporting.running.quiet()
    assert reporting.running.writes() == sent
    assert room.get("ArksQuota", NAME)["metadata"]["resourceVersion"] == version


async def test_reports_that_follow_each_other_closely_are_one_write_the_last_one(reporting, room):
    await reporting.report(prompt=1, response=0, total=1)
    await reporting.shows(prompt=1, response=0, total=1)
    await reporting.running.quiet()
    sent, spending = reporting.running.writes(), reporting.controller.spending
    now_s = spending._clock()
    spending._clock = lambda: now_s  # the next write is not due, however long all this takes
    for used in range(2, 30):
        await reporting.report(prompt=used, response=0, total=used)
    await reporting.running.quiet()
    assert reporting.running.writes() == sent
    assert reporting.controller.reconciler.queue.delayed, "nobody will look again"
    now_s += EVERY_S
    await reporting.shows(prompt=29, response=0, total=29)
    assert (reporting.running.writes() - sent).total() == 1


async def test_a_restart_keeps_what_stands_there_until_a_report_comes(reporting, room):
    await reporting.report(prompt=7, response=20, total=27)
    before = await reporting.shows(prompt=7, response=20, total=27)
    await reporting.restart()
    assert reporting.running.writes().total() == 0
    # A condition that is written anew must not take the field with it: an apply drops what it no longer says.
    room.patch("ArksQuota", NAME, {"spec": {"quotas": [{"type": "prompt", "value": 5}, {"type": "total", "value": 9}]}})
    changed = await room.until(
        "ArksQuota", NAME, lambda item: item["status"]["observedGeneration"] == item["metadata"]["generation"]
    )
    assert shown(changed) == {"prompt": 7, "response": 20, "total": 27}
    await reporting.report(prompt=7, total=28)
    times = await reporting.shows(prompt=7, total=28)
    assert times["prompt"] == before["prompt"]


async def test_only_kinds_of_the_spec_are_shown_and_a_new_one_when_it_is_reported(reporting, room):
    await reporting.report(prompt=7, response=20, total=27)
    await reporting.shows(prompt=7, response=20, total=27)
    await reporting.hurry()
    room.patch("ArksQuota", NAME, {"spec": {"quotas": [{"type": "total", "value": 9}]}})
    await reporting.shows(total=27)
    await reporting.hurry()
    await reporting.report(total=27)
    room.patch(
        "ArksQuota", NAME, {"spec": {"quotas": [{"type": "response", "value": 9}, {"type": "total", "value": 9}]}}
    )
    await reporting.running.quiet()
    assert shown(room.get("ArksQuota", NAME)) == {"total": 27}
    await reporting.report(response=20, total=27)
    await reporting.shows(response=20, total=27)


async def test_what_arks_left_in_the_status_gives_way_to_the_first_report(room, tmp_path):
    room.apply(QUOTA)
    left = [{"type": kind, "used": 90_000} for kind in ("prompt", "response", "total")]
    room.api.set_status(room.get("ArksQuota", NAME), quotaStatus=left)
    reporting = Reporting(room, tmp_path)
    await reporting.start()
    try:
        await room.condition("ArksQuota", NAME, "Accepted", "True")
        assert room.get("ArksQuota", NAME)["status"]["quotaStatus"] == left
        await reporting.report(prompt=0, response=0, total=0)
        await reporting.shows(prompt=0, response=0, total=0)
    finally:
        await reporting.running.stop()


async def test_a_deleted_quota_is_forgotten_and_unknown_ones_are_never_remembered(reporting, room):
    await reporting.report(prompt=7, response=20, total=27)
    await reporting.shows(prompt=7, response=20, total=27)
    await reporting.report("never-was", total=1)
    assert not reporting.controller.spending.heard_of(Key(room.namespace, "never-was"))
    room.delete("ArksQuota", NAME)
    await _until(lambda: not reporting.controller.spending.heard_of(Key(room.namespace, NAME)))
    room.apply(QUOTA)
    await room.condition("ArksQuota", NAME, "Accepted", "True")
    await reporting.running.quiet()
    assert shown(room.get("ArksQuota", NAME)) == {}
    await reporting.report(prompt=7, response=20, total=27)
    await reporting.shows(prompt=7, response=20, total=27)


async def test_a_use_that_somebody_else_wrote_over_is_put_right(reporting, room):
    await reporting.report(prompt=7, response=20, total=27)
    await reporting.shows(prompt=7, response=20, total=27)
    await reporting.hurry()
    room.api.set_status(room.get("ArksQuota", NAME), quotaStatus=[{"type": "total", "used": 1}])
    await reporting.shows(prompt=7, response=20, total=27)


async def test_only_the_leader_writes(reporting, room, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    standing_by = Reporting(room, second)
    await standing_by.running.start()
    try:
        await _until(standing_by.controller.publisher.ready.is_set)
        await standing_by.report(prompt=1, response=1, total=2)
        assert standing_by.controller.spending.heard_of(Key(room.namespace, NAME))
        await reporting.report(prompt=7, response=20, total=27)
        await reporting.shows(prompt=7, response=20, total=27)
        assert standing_by.running.writes().total() == 0
        await reporting.running.stop()
        await standing_by.shows(prompt=1, response=1, total=2)
    finally:
        await standing_by.running.stop()


def test_memory_is_one_entry_for_each_quota_and_none_for_what_is_gone():
    spending = Spending()
    for turn in range(100):
        spending.report(Key("a", "q"), {"total": turn})
        spending.written(Key("a", "q"))
    assert len(spending._spent) == len(spending._written_s) == 1
    spending.forget(Key("a", "q"))
    spending.written(Key("a", "q"))  # a write that was under way
    assert not spending._spent
    assert not spending._written_s
