"""Two candidates on a real API server: one leads, never both, whatever happens to the one or its connection.

Proof by fence intervals: each candidate notes the span (on the machine's one monotonic clock) of every write that its
fence let through; spans of different candidates may never interleave.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.kube.client import Client
from controller.kube.errors import NotLeaderError
from controller.kube.lease import Lease
from controller.kube.resource import LEASES
from tests.harness.kubernetes import KubeApi
from tests.harness.tcp_proxy import TcpProxy
from tests.kube.conftest import Connect, running, until

LEASE_S, RENEW_S, RETRY_S = SHORT_S = (3.0, 2.0, 0.3)
LONG_S = (300.0, 200.0, 1.0)
"""of a lease that no test waits for"""
Span = tuple[float, float]


class Candidate:
    """A candidate in a process of its own."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        identity: str,
        folder: Path,
        port: int = 0,
        times_s: tuple[float, ...] = SHORT_S,
    ) -> None:
        self.identity, self.notes = identity, folder / identity
        self.notes.touch()
        (folder / "token").write_text(api.token())
        shutil.copy(api.ca_file, folder / "ca.crt")
        arguments = [str(folder), str(port or api.port), namespace, identity, str(self.notes), "5"]
        arguments += map(str, times_s)
        self.process = subprocess.Popen([sys.executable, "-m", "tests.kube.candidate", *arguments])

    def lines(self) -> list[str]:
        return self.notes.read_text().splitlines(keepends=True)

    def reigns(self) -> list[list[Span]]:
        """Its writes, by the times that it was elected."""
        found: list[list[Span]] = []
        for line in self.lines():
            if line == "# leading\n":
                found.append([])
            elif line.endswith("\n") and not line.startswith("#"):
                began, ended = line.split()
                found[-1].append((float(began), float(ended)))
        return found

    def spans(self) -> list[Span]:
        return list(itertools.chain(*self.reigns()))

    def goes_on(self, writes: int) -> None:
        """Wait until it has written so often from now on."""
        before = len(self.spans())
        wait(lambda: len(self.spans()) >= before + writes)

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def two(
    kube_api: KubeApi, kube_namespace: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[list[Candidate]]:
    """The first leads already, the second stands by."""
    times_s = getattr(request, "param", SHORT_S)
    both = [Candidate(kube_api, kube_namespace, name, tmp_path, times_s=times_s) for name in ("one", "two")]
    try:
        wait(lambda: both[0].lines() and both[1].lines())
        wait(lambda: both[0].spans() or both[1].spans())
        both.sort(key=lambda each: not each.spans())
        assert not both[1].spans()
        yield both
    finally:
        for each in both:
            each.end()


def wait(condition: object, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "never became true"
        time.sleep(0.02)


def assert_never_both(*spans: list[Span]) -> None:
    marked = sorted((span, who) for who, each in enumerate(spans) for span in each)
    reigns = [(who, list(group)) for who, group in itertools.groupby(marked, key=lambda item: item[1])]
    for (_, before), (_, after) in itertools.pairwise(reigns):
        assert max(ended for (_, ended), _ in before) <= min(began for (began, _), _ in after)


@pytest.mark.parametrize("two", [LONG_S], indirect=True)
async def test_a_leader_that_ends_hands_over_at_once(two: list[Candidate]) -> None:
    one, second = two
    one.process.terminate()
    wait(second.spans)  # waiting for it to run out would take longer
    assert one.process.wait(60) == 0
    assert_never_both(one.spans(), second.spans())


async def test_a_leader_that_was_paused_writes_nothing_when_it_wakes(two: list[Candidate]) -> None:
    one, second = two
    one.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    wait(second.spans)
    woke = time.monotonic()
    one.process.send_signal(signal.SIGCONT)
    second.goes_on(40)
    interrupted, *later = one.reigns()
    # What was in flight when it froze may be answered late; nothing was begun after the fence fell.
    assert not [began for began, _ in interrupted if began > stopped + RENEW_S]
    # And the other has waited for the lease to run out.
    assert second.spans()[0][0] - interrupted[-1][0] >= LEASE_S - RENEW_S
    begun = [(began, min(ended, stopped + RENEW_S) if ended > woke else ended) for began, ended in interrupted]
    assert_never_both([*begun, *itertools.chain(*later)], second.spans())


async def test_a_leader_killed_in_the_midst_of_its_writes_is_succeeded_and_the_state_converges(
    two: list[Candidate], kube_api: KubeApi, kube_namespace: str
) -> None:
    one, second = two
    one.process.kill()
    wait(lambda: len(second.spans()) >= 10)
    made = {each["metadata"]["name"]: each["data"]["by"] for each in kube_api.list("v1", "ConfigMap", kube_namespace)}
    assert made == {f"c{n}": second.identity for n in range(5)}
    assert_never_both(one.spans(), second.spans())


async def test_a_half_open_connection_costs_the_leadership_not_the_truth(
    kube_api: KubeApi, kube_namespace: str, tmp_path: Path
) -> None:
    async with TcpProxy(kube_api.port) as proxy:
        one = Candidate(kube_api, kube_namespace, "one", tmp_path, proxy.port)
        second = None
        try:
            await until(one.spans)
            second = Candidate(kube_api, kube_namespace, "two", tmp_path)
            await until(second.lines)
            proxy.black_hole()
            cut = time.monotonic()
            await until(second.spans)
            proxy.heal()
            await asyncio.to_thread(second.goes_on, 50)
            assert not [began for began, _ in one.reigns()[0] if began > cut + RENEW_S]
            assert_never_both(one.spans(), second.spans())
        finally:
            for each in filter(None, (one, second)):
                await asyncio.to_thread(each.end)


async def test_one_dead_connection_does_not_end_a_reign(
    kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    async with TcpProxy(kube_api.port) as proxy:
        client = await connect(kube_api.kubeconfig(server=proxy.url))
        lease = Lease(client, kube_namespace, "leader", "one", lease_s=8, renew_s=6, retry_s=0.3)
        async with running(lambda: lease.run(asyncio.Event().wait)):  # type: ignore[arg-type]
            await until(lambda: lease.is_leader)
            errors = lease.stats.errors
            proxy.black_hole(new=False)
            renewed = lease.stats.renewals
            await until(lambda: lease.stats.renewals > renewed)
            assert lease.stats.lost == 0
            assert lease.stats.errors > errors


class Led:
    """A leader's task that a test looks into."""

    def __init__(self) -> None:
        self.running = False
        self.started = 0

    async def __call__(self) -> None:
        self.running, self.started = True, self.started + 1
        try:
            await asyncio.Event().wait()
        finally:
            self.running = False


def lease_of(client: Client, namespace: str, identity: str) -> Lease:
    return Lease(client, namespace, "leader", identity, lease_s=2, renew_s=1.2, retry_s=0.2)


async def test_while_the_server_is_away_nobody_leads_and_afterwards_someone_does(
    own_kube_api: KubeApi, connect: Connect
) -> None:
    client = await connect(own_kube_api.kubeconfig(), timeout_s=5)
    # It is handed back within `retry_s`, which a server that has just woken up may need.
    led, lease = Led(), Lease(client, "default", "leader", "one", lease_s=5, renew_s=2.5, retry_s=1.5)
    with pytest.raises(NotLeaderError):
        lease.fence()
    async with running(lambda: lease.run(led)):
        await until(lambda: led.running and lease.is_leader)
        assert 0 < lease.fence() <= 2.5
        own_kube_api.freeze()
        try:
            await until(lambda: not led.running)
            with pytest.raises(NotLeaderError):
                lease.fence()
        finally:
            own_kube_api.thaw()
        await until(lambda: led.running and lease.is_leader)
        assert led.started > 1
    assert not led.running
    assert lease.stats.released == 1
    assert (await client.get(LEASES, "leader", "default"))["spec"]["holderIdentity"] == ""


async def test_a_leaders_task_that_fails_is_started_again(
    kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    lease = lease_of(await connect(kube_api.kubeconfig()), kube_namespace, "one")
    started = 0

    async def failing() -> None:
        nonlocal started
        started += 1
        raise ValueError("defect")

    async with running(lambda: lease.run(failing)):
        await until(lambda: started >= 3 and lease.is_leader)
        assert lease.stats.task_errors >= 2


async def test_a_lease_taken_by_hand_is_given_up(kube_api: KubeApi, kube_namespace: str, connect: Connect) -> None:
    client = await connect(kube_api.kubeconfig())
    led, lease = Led(), lease_of(client, kube_namespace, "one")
    async with running(lambda: lease.run(led)):
        await until(lambda: led.running)
        patch = {"spec": {"holderIdentity": "operator", "leaseDurationSeconds": 1}}
        await client.patch(LEASES, "leader", kube_namespace, patch)
        await until(lambda: not led.running)
        assert lease.holder == "operator"
        await until(lambda: led.running)  # the operator never renewed
        found = await client.get(LEASES, "leader", kube_namespace)
        assert found["spec"]["leaseTransitions"] == 1


async def test_losing_the_lease_does_not_wait_for_a_task_to_write_more(
    kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    client = await connect(kube_api.kubeconfig())
    lease = lease_of(client, kube_namespace, "one")
    refused = asyncio.Event()

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        try:
            lease.fence()
        except NotLeaderError:
            refused.set()

    async with running(lambda: lease.run(stubborn)):
        await until(lambda: lease.is_leader)
        await client.patch(LEASES, "leader", kube_namespace, {"spec": {"holderIdentity": "another"}})
        await asyncio.wait_for(refused.wait(), 60)


async def test_a_leaders_task_that_does_not_end_is_told_to_liveness(
    kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    client = await connect(kube_api.kubeconfig())
    lease = lease_of(client, kube_namespace, "one")
    let_go = asyncio.Event()

    async def deaf() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await let_go.wait()

    async with running(lambda: lease.run(deaf)):
        await until(lambda: lease.is_leader)
        assert lease.ending_s == 0.0
        patch = {"spec": {"holderIdentity": "another", "leaseDurationSeconds": 1}}
        await client.patch(LEASES, "leader", kube_namespace, patch)
        await until(lambda: lease.ending_s > 0.5)
        with pytest.raises(NotLeaderError):
            lease.fence()
        let_go.set()
        await until(lambda: lease.is_leader)
        assert lease.ending_s == 0.0


@pytest.mark.parametrize("times", [(1.0, 2.0, 3.0), (0.5, 0.4, 0.1)])
async def test_times_that_would_let_two_lead_are_refused(times: tuple[float, float, float]) -> None:
    lease_s, renew_s, retry_s = times
    with pytest.raises(ValueError, match="lease_s"):
        Lease(None, "n", "l", "me", lease_s=lease_s, renew_s=renew_s, retry_s=retry_s)  # type: ignore[arg-type]
