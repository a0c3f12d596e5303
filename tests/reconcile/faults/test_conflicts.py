"""Somebody fights for what we write: spec, status, finalizers and the Lease itself; then stops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import pytest

from tests.harness.kubernetes import KubeError, Object
from tests.reconcile.conftest import condition, wait_for
from tests.reconcile.faults.process import NAMESPACE
from tests.reconcile.faults.world import Changing, World, insist, made_twice, unfenced, writes
from tests.reconcile.resources import ENDPOINT

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ROUNDS = 25
LIED_AT = "2026-01-01T00:00:00Z"
MERGE = "application/merge-patch+json"
DOOMED = 8
FINALIZER = "endpoint.arks.ai/controller"


class Rival:
    """Threads that write the same thing wrong again and again, as fast as the server takes it."""

    def __init__(self, *wrongs: Callable[[int], Any]) -> None:
        self._wrongs = wrongs
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(len(wrongs))
        self.written = dict.fromkeys(range(len(wrongs)), 0)

    def __enter__(self) -> Self:
        self._ends = [self._pool.submit(self._fight, index) for index in range(len(self._wrongs))]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for end in self._ends:
            end.result()

    def _fight(self, index: int) -> None:
        for number in itertools.count(1):
            if self._stop.wait(0.01):
                return
            try:
                self._wrongs[index](number)
                self.written[index] += 1
            except KubeError as error:
                if error.status not in {404, 409}:
                    raise

    @property
    def rounds(self) -> int:
        return min(self.written.values())


def lie(type_: str, status: str) -> Object:
    said = {"type": type_, "status": status, "reason": "Rival", "message": "", "lastTransitionTime": LIED_AT}
    return {"conditions": [said]}


async def test_a_rival_for_spec_status_and_lease(world: World):
    room, api, process = world.room, world.room.api, world.process
    mark = api.audit.mark()

    def status(kind: str, name: str, **fields: Any) -> Any:
        meta = {"name": name, "namespace": room.namespace}
        return api.set_status({"apiVersion": "arks.ai/v1", "kind": kind, "metadata": meta}, **fields)

    lease = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/arks-controller"
    service = "arks-application-app-qwen"
    wrongs = (
        lambda n: status("ArksApplication", "app-qwen", phase="Failed", readyReplicas=n, **lie("Degraded", "True")),
        lambda n: status("ArksEndpoint", "qwen-7b", routes=[], **lie("Programmed", "False")),
        lambda n: status("ArksToken", "example-token", **lie("Accepted", "False")),
        lambda n: status("ArksModel", "qwen-7b", phase="Failed", progress={"filesDone": n}, **lie("Ready", "Unknown")),
        lambda n: room.patch("HTTPRoute", "qwen-7b", {"spec": {"rules": [{"timeouts": {"request": f"{n}s"}}]}}),
        lambda n: room.patch("Service", service, {"spec": {"selector": {"arks.ai/work-load-role": f"r{n}"}}}),
        lambda n: room.patch("RoleBasedGroup", "app-qwen-0", {"metadata": {"annotations": {"rival": str(n)}}}),
        lambda n: room.patch("ArksApplication", "app-qwen", {"metadata": {"annotations": {"rival": str(n)}}}),
        lambda n: api.request("PATCH", lease, {"metadata": {"annotations": {"rival": str(n)}}}, content_type=MERGE),
    )
    with Rival(*wrongs) as rival:
        async with Changing(world):
            await wait_for(lambda: rival.rounds >= ROUNDS, 120.0)
    await room.until("ArksApplication", "app-qwen", lambda item: condition(item, "Degraded") is None)
    await room.until("ArksModel", "qwen-7b", lambda item: "progress" not in item["status"])
    await room.until("Service", service, lambda item: item["spec"]["selector"]["arks.ai/work-load-role"] == "leader")
    await room.until("HTTPRoute", "qwen-7b", lambda item: item["spec"]["rules"][0]["timeouts"] == {"request": "0s"})
    await world.settled()
    assert process.running
    assert not process.tracebacks()
    assert not process.said("cannot succeed, waits for a change")
    assert not unfenced(room, mark)
    written = writes(room, mark)
    assert not made_twice(written)
    # Each wrong is put right about once: we answer, we do not race.
    assert len(written) < 2 * sum(rival.written.values()) + 200


async def test_a_deletion_that_meets_conflicts_ends(world: World):
    """Taking a finalizer off asks for the newest version, which somebody changes all the time."""
    room, process = world.room, world.process
    conflicts = process.metric("arks_controller_api_calls_total", outcome="409")

    def disturb(name: str) -> Callable[[int], Any]:
        return lambda n: room.patch("ArksEndpoint", name, {"metadata": {"annotations": {"rival": str(n)}}})

    until = time.monotonic() + 120.0
    while process.metric("arks_controller_api_calls_total", outcome="409") <= conflicts:
        assert time.monotonic() < until, "no deletion ever met a conflict"
        names = [f"doomed-{number}" for number in range(DOOMED)]
        for name in names:
            held = f"{{name: {name}, finalizers: [{FINALIZER}]}}"
            await insist(room.apply, ENDPOINT.replace("{name: qwen-7b}", held))
        with Rival(*map(disturb, names)) as rival:
            await wait_for(lambda rival=rival: rival.rounds >= 3)
            for name in names:
                await asyncio.to_thread(room.delete, "ArksEndpoint", name)
            await asyncio.gather(*(room.gone("ArksEndpoint", name) for name in names))
        await asyncio.gather(*(room.gone("HTTPRoute", name) for name in names))
    await world.settled()
    assert not process.tracebacks()
