"""The leader dies, or sleeps, in the midst of hundreds of writes: the other finishes, nothing is done twice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable

import pytest

from tests.harness.kubernetes import Object
from tests.reconcile.conftest import Room, condition, wait_for
from tests.reconcile.faults.process import ControllerProcess
from tests.reconcile.faults.world import CONVERGE_S, DEPUTY, Start, accepted, made_twice, still, unfenced, writes
from tests.reconcile.resources import ENDPOINT, GATEWAY, MODEL

pytestmark = pytest.mark.timeout(240)

ENDPOINTS, MODELS = 200, 20
LAST = 20
BEGUN = 60  # writes after which the leader is in the midst of its work


async def test_a_leader_killed_in_the_midst_of_hundreds_of_writes(hall: Room, start: Start):
    first, second, mark = await succeeded(hall, start, lambda leader: leader.end(signal.SIGKILL))
    await finished(hall, mark)
    assert {each.user for each in writes(hall, mark)} == {first.user, second.user}
    assert not unfenced(hall, mark)


async def test_a_leader_that_slept_through_its_succession_writes_nothing_when_it_wakes(hall: Room, start: Start):
    first, second, mark = await succeeded(hall, start, lambda leader: leader.send(signal.SIGSTOP))
    woken = hall.api.audit.mark()
    first.send(signal.SIGCONT)  # while the other writes
    await wait_for(lambda: first.said("leadership lost"))
    await finished(hall, mark)
    assert not first.leads
    # A tenth of a millisecond lies between the last look at the fence and the socket. Whoever is stopped right there
    # wakes with that one write in hand; the other has put right by now what it spoiled.
    late = [each for each in hall.api.audit.writes(since=woken, user=first.user) if each.resource != "leases"]
    assert unfenced(hall, mark) == late
    assert len(late) <= 1
    # It follows again, as good as any other: when its turn comes, nothing is left to be changed.
    before = versions(hall)
    assert second.end() == 0
    await wait_for(lambda: first.leads)
    hall.patch("ArksEndpoint", "many-0", {"spec": {"defaultWeight": 9}})
    await hall.until("ArksEndpoint", "many-0", accepted)
    await still(hall)
    assert {name for name, version in versions(hall) if (name, version) not in before} == {"many-0"}
    assert first.running


async def succeeded(
    hall: Room, start: Start, stop: Callable[[ControllerProcess], object]
) -> tuple[ControllerProcess, ControllerProcess, int]:
    """The leader is stopped in the midst of its writes, and the deputy leads. Both, and where their writes begin."""
    first, second = await leader_and_deputy(start)
    mark = hall.api.audit.mark()
    stopped = threading.Event()
    asking = asyncio.create_task(asyncio.to_thread(ask_for_much, hall, stopped))
    try:
        await wait_for(lambda: len(writes(hall, mark)) >= BEGUN)
        stop(first)
        assert len(hall.list("HTTPRoute")) < ENDPOINTS
    finally:
        stopped.set()
        await asking
    await wait_for(lambda: second.leads)
    return first, second, mark


async def leader_and_deputy(start: Start) -> tuple[ControllerProcess, ControllerProcess]:
    first = start("controller")
    await wait_for(lambda: first.leads)
    second = start(DEPUTY)
    await wait_for(lambda: second.get("/readyz")[0] == 200)
    assert not second.leads
    return first, second


def ask_for_much(hall: Room, stopped: threading.Event) -> None:
    """The last of it only when the leader is stopped: however quick it is, it does not get done before."""
    hall.apply(GATEWAY)
    asked = [MODEL.replace("qwen-7b", f"many-{number}") for number in range(MODELS)]
    asked += [ENDPOINT.replace("qwen-7b", f"many-{number}") for number in range(ENDPOINTS)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(hall.apply, asked[:-LAST]))
        stopped.wait()
        list(pool.map(hall.apply, asked[-LAST:]))


async def finished(hall: Room, mark: int) -> None:
    """All that was asked for is there, once, and belongs to who asked; then nothing is written any more."""

    def wrong() -> str:
        endpoints, models = hall.list("ArksEndpoint"), hall.list("ArksModel")
        there = {each["metadata"]["uid"] for each in (*endpoints, *models)}
        late = [each["metadata"]["name"] for each in endpoints if not accepted(each)]
        late += [each["metadata"]["name"] for each in models if not _loading(each)]
        counts = {kind: len(hall.list(kind)) for kind in ("HTTPRoute", "Job", "PersistentVolumeClaim")}
        if counts != {"HTTPRoute": ENDPOINTS, "Job": MODELS, "PersistentVolumeClaim": MODELS}:
            return f"there are {counts}"
        strays = [each["metadata"]["name"] for kind in counts for each in hall.list(kind) if _owner(each) not in there]
        return f"late: {late}, strays: {strays}" if late or strays else ""

    try:
        await wait_for(lambda: not wrong(), CONVERGE_S)
    except TimeoutError:
        raise AssertionError(wrong()) from None
    await still(hall)
    assert not wrong()
    assert not made_twice(writes(hall, mark))


def versions(hall: Room) -> set[tuple[str, str]]:
    kinds = ("ArksEndpoint", "ArksModel", "HTTPRoute", "Job", "PersistentVolumeClaim")
    found = [each["metadata"] for kind in kinds for each in hall.list(kind)]
    return {(meta["name"], meta["resourceVersion"]) for meta in found}


def _loading(model: Object) -> bool:
    return (condition(model, "ModelLoaded") or {}).get("reason") == "ModelLoading"


def _owner(item: Object) -> str:
    (owner,) = item["metadata"]["ownerReferences"]
    return str(owner["uid"])
