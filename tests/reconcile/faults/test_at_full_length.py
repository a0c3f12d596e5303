"""The same faults for as long as they last outside, on `arks controller` with its own times. `make test-faults`."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from controller.health import DEAF_S
from controller.kube.client import SILENCE_S
from controller.permissions import SERVICE_ACCOUNT, rbac
from tests.harness.rights import until_granted
from tests.harness.tcp_proxy import TcpProxy
from tests.reconcile.conftest import wait_for
from tests.reconcile.faults.world import Changing, World, alive, over, seen

REAL = True
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("ARKS_FAULTS") != "1", reason="takes ten minutes; make test-faults"),
]


@pytest.mark.parametrize("all_rights", [False, True], ids=["to-write", "all"])
async def test_more_than_a_minute_of_403(world: World, proxy: TcpProxy, all_rights: bool):
    """After 54 s of it others exit."""
    api, mark = world.room.api, world.room.api.audit.mark()
    taken = {"ClusterRoleBinding", "RoleBinding"} if all_rights else {"ClusterRoleBinding"}
    calls = world.process.metric("arks_controller_api_calls_total", outcome="403")
    refused = seen(world, "watch broken", error="403")
    bindings = [each for each in rbac() if each["kind"] in taken]
    async with Changing(world) as changing:
        for each in bindings:
            api.delete(each["apiVersion"], each["kind"], SERVICE_ACCOUNT, each["metadata"].get("namespace", ""))
        if all_rights:
            await asyncio.to_thread(until_granted, api, "controller", granted=False)
            proxy.reset()
        await last(world, 75.0)
        assert refused() or not all_rights
        assert world.process.metric("arks_controller_api_calls_total", outcome="403") > calls + 10
        assert changing.rounds > 10
        api.apply(*bindings)
    await over(world, mark)


async def test_a_black_hole_until_the_watches_notice(world: World, proxy: TcpProxy):
    mark, silent = world.room.api.audit.mark(), seen(world, "watch broken", error=f"silent for {SILENCE_S:.0f} s")
    async with Changing(world):
        proxy.black_hole()
        try:
            await wait_for(silent, 2 * SILENCE_S)
            await last(world, 30.0)
        finally:
            proxy.heal()
    await over(world, mark)


async def test_an_api_server_frozen_until_we_count_as_dead(world: World):
    api, process, mark = world.room.api, world.process, world.room.api.audit.mark()
    async with Changing(world):
        api.freeze()
        try:
            await last(world, DEAF_S - 30.0)
            await wait_for(lambda: process.get("/healthz")[0] == 503, 120.0)
            assert "has not been heard for" in process.get("/healthz")[1]
            assert process.get("/readyz") == (200, "ok")
            assert process.running
        finally:
            api.thaw()
        await wait_for(lambda: process.get("/healthz") == (200, "ok"), 60.0)
    await over(world, mark)


async def last(world: World, for_s: float) -> None:
    """The fault goes on for that long, and the process lives through it."""
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        await asyncio.to_thread(alive, world)
        await asyncio.sleep(1.0)
