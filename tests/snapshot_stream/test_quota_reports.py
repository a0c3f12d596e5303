"""What quotas have used, from extproc's limit store to the controller, and every way in which that can be lost."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from structlog.testing import capture_logs

from apis.policy import Quota, QuotaLimit
from apis.records import REPORT_METHOD
from apis.wire.snapshot_pb2 import QuotaUse, ReportRequest, ReportResponse
from controller.snapshot.feed import Feed
from controller.snapshot.server import PolicyServer
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Lease
from extproc.snapshot.index import LiveIndex
from extproc.snapshot.report import PIECE, QuotaReport
from tests.snapshot_stream.world import Following, drop, put, quota, until


class DataPlane:
    """extproc's side: a stream source, the index and the limit store behind it, and the report."""

    def __init__(self, folder: Path) -> None:
        self.live, self.store = LiveIndex(), MemoryStore()
        self.following = Following(folder)
        self.report = QuotaReport(self.following.source, self.live, self.store.used, every_s=0.05)
        self._leases = 0

    def use(self, name: str, prompt: int, response: int, namespace: str = "team-a") -> None:
        """A request, as it is settled in the end."""
        self._leases += 1
        rules = self.live.current.quota_rules[namespace, name]
        lease = self.store.reserve(f"lease-{self._leases}", rules, Amounts(1, 0, 0), ttl_s=60)
        assert isinstance(lease, Lease)
        self.store.settle(lease, Amounts(1, prompt, response))

    async def apply(self) -> None:
        """As the process does with each new policy."""
        known = None
        while True:
            if self.following.policies and self.following.policy is not known:
                known = self.following.policy
                await self.live.apply(known)
            await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["DataPlane"]:
        async with self.following.running():
            await self.live.apply(self.following.policy)
            await until(lambda: self.following.source.connections >= 2)  # start's own, then run's
            tasks = [asyncio.create_task(work()) for work in (self.apply, self.report.run)]
            try:
                yield self
                assert not [task for task in tasks if task.done()]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


class Controller:
    """The controller's side: `used` is what it was told last, `told` how often each quota came."""

    def __init__(self, feed: Feed, folder: Path) -> None:
        self.feed, self.folder = feed, folder
        self.used: dict[str, dict[str, int]] = {}
        self.told: list[str] = []
        self.messages: list[ReportRequest] = []
        self.ready = asyncio.Event()
        self.ready.set()

    def heard(self, report: ReportRequest) -> None:
        self.messages.append(report)
        for each in report.quotas:
            self.told.append(each.name)
            kinds = [kind for kind in ("prompt", "response", "total") if each.HasField(kind)]
            self.used[each.name] = {kind: getattr(each, kind) for kind in kinds}

    def serving(self) -> PolicyServer:
        return PolicyServer(
            self.feed,
            f"unix:{self.folder / 'policy.sock'}",
            ready=self.ready,
            view_age_s=lambda: 0.0,
            on_report=self.heard,
            pulse_s=0.05,
        )


def three_kinds(name: str = "basic") -> Quota:
    return Quota("team-a", name, (QuotaLimit("prompt", 100), QuotaLimit("response", 500), QuotaLimit("total", 600)))


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
def controller(feed: Feed, tmp_path: Path) -> Controller:
    return Controller(feed, tmp_path)


@pytest.fixture
def plane(tmp_path: Path) -> DataPlane:
    return DataPlane(tmp_path)


async def test_what_was_charged_arrives_by_kind_and_what_is_only_reserved_does_not(feed, controller, plane):
    put(feed, three_kinds(), quota("total-alone"))
    async with controller.serving(), plane.running():
        await until(lambda: controller.used.keys() == {"basic", "total-alone"})
        assert controller.used["basic"] == {"prompt": 0, "response": 0, "total": 0}
        plane.store.reserve("open", plane.live.current.quota_rules["team-a", "basic"], Amounts(1, 50, 50), ttl_s=60)
        plane.use("basic", 7, 20)
        await until(lambda: controller.used["basic"]["total"])
        assert controller.used == {"basic": {"prompt": 7, "response": 20, "total": 27}, "total-alone": {"total": 0}}


async def test_only_what_changed_is_told_again(feed, controller, plane):
    put(feed, *(quota(f"q{index}") for index in range(20)))
    async with controller.serving(), plane.running():
        await until(lambda: len(controller.used) == 20)
        controller.told.clear()
        for turn in range(3):
            plane.use("q7", 1, 0)
            await until(lambda turn=turn: controller.used["q7"]["total"] == turn + 1)
        assert set(controller.told) == {"q7"}


async def test_the_next_life_of_the_controller_is_told_everything(feed, controller, plane):
    put(feed, quota("used"), quota("unused"))
    async with contextlib.AsyncExitStack() as stack:
        async with controller.serving():
            await stack.enter_async_context(plane.running())
            plane.use("used", 5, 5)
            await until(lambda: controller.used.get("used") == {"total": 10})
        second = Controller(feed, controller.folder)
        async with second.serving():
            await until(lambda: second.used == {"used": {"total": 10}, "unused": {"total": 0}})


async def test_what_is_used_while_the_controller_is_away_is_told_when_it_is_back_and_kept_by_nobody(
    feed, controller, plane
):
    put(feed, quota("used"))
    async with contextlib.AsyncExitStack() as stack:
        async with controller.serving():
            await stack.enter_async_context(plane.running())
            await until(lambda: controller.used)
        await until(lambda: not plane.following.source.status.ok)
        for _ in range(30):
            plane.use("used", 1, 1)
            await asyncio.sleep(0)
        assert len(plane.report._told) == 1
        told = len(controller.messages)
        async with controller.serving():
            await until(lambda: controller.used == {"used": {"total": 60}})
            assert len(controller.messages) == told + 1, "more than the last word was kept"


async def test_a_controller_that_takes_no_reports_is_told_of_once_and_tried_on(feed, controller, plane, monkeypatch):
    put(feed, quota("used"))
    tries = []
    refusing = True

    async def report(_self, request, context):
        tries.append(request)
        if refusing:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        controller.heard(request)
        return ReportResponse()

    monkeypatch.setattr(PolicyServer, "_report", report)
    with capture_logs() as logs:
        async with controller.serving(), plane.running():
            await until(lambda: len(tries) > 3)
            refusing = False
            await until(lambda: controller.used)
            plane.use("used", 1, 1)
            await until(lambda: controller.used == {"used": {"total": 2}})
    said = [each for each in logs if "use of quotas" in each["event"]]
    assert [each["log_level"] for each in said] == ["warning", "info"]
    assert said[0]["reason"] == "unimplemented"


async def test_ten_thousand_quotas_with_the_longest_names_arrive_in_messages_that_are_taken(feed, controller, plane):
    names = [f"{index:05}-".ljust(253, "x") for index in range(10_000)]
    space = "n" * 63
    for begin in range(0, len(names), 100):
        put(feed, *(Quota(space, name, three_kinds().limits) for name in names[begin : begin + 100]))
    async with controller.serving(), plane.running():
        for name in names[:300]:
            plane.store.set_used(f"quota/{space}/{name}/total", 2**53 - 1)
        await until(lambda: len(controller.used) == len(names), 60.0)
        await until(lambda: controller.used[names[299]]["total"] == 2**53 - 1, 60.0)
        assert max(len(message.quotas) for message in controller.messages) == PIECE
        assert max(message.ByteSize() for message in controller.messages) < 1 << 16


def test_the_largest_piece_fits_into_a_message():
    """64 KiB, as the server takes them."""
    most = QuotaUse(namespace="n" * 63, name="q" * 253, prompt=2**63 - 1, response=2**63 - 1, total=2**63 - 1)
    assert ReportRequest(quotas=[most] * PIECE).ByteSize() < 1 << 16


async def test_a_quota_that_left_the_policy_is_forgotten_and_told_anew_when_it_is_made_again(feed, controller, plane):
    put(feed, quota("goes"), quota("stays"))
    async with controller.serving(), plane.running():
        plane.use("goes", 5, 5)
        await until(lambda: controller.used == {"goes": {"total": 10}, "stays": {"total": 0}})
        drop(feed, quota("goes"))
        await until(lambda: plane.report._told.keys() == {("team-a", "stays")})
        controller.used.clear()
        put(feed, quota("goes"))
        await until(lambda: controller.used == {"goes": {"total": 10}})


async def test_a_quota_made_anew_between_two_looks_is_told_anew(feed, controller, plane):
    put(feed, quota("again"))
    async with controller.serving(), plane.running():
        await until(lambda: controller.used)
        controller.used.clear()
        drop(feed, quota("again"))
        put(feed, quota("again"))
        await until(lambda: controller.used == {"again": {"total": 0}})


async def test_a_controller_that_does_not_know_the_cluster_yet_takes_no_report(controller):
    controller.ready.clear()
    async with (
        controller.serving() as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        report = channel.unary_unary(REPORT_METHOD, request_serializer=ReportRequest.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await report(ReportRequest(quotas=[QuotaUse(namespace="a", name="b", total=1)]))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not controller.messages
