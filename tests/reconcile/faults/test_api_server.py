"""The API server goes away, freezes, is cut off or refuses us, while changes go on; one process outlives it all."""

from __future__ import annotations

import asyncio

import pytest

from controller.permissions import SERVICE_ACCOUNT, rbac
from tests.harness.rights import until_granted
from tests.harness.tcp_proxy import TcpProxy
from tests.reconcile.conftest import wait_for
from tests.reconcile.faults.world import TOKENS_KEPT, Changing, World, alive, over, seen, still, writes

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


async def test_an_api_server_that_is_killed_and_comes_back_without_its_history(world: World, proxy: TcpProxy):
    """We are cut off before, so that it forgets what we have not heard: tokens were deleted meanwhile."""
    api, process = world.room.api, world.process
    mark, broken = api.audit.mark(), seen(world, "watch broken")
    async with Changing(world) as changing:
        await wait_for(lambda: changing.rounds)
        proxy.refuse()
        unheard = changing.rounds + 2 * TOKENS_KEPT
        await wait_for(lambda: changing.rounds >= unheard)
        api.compact()
        await asyncio.to_thread(api.stop, kill=True)
        await wait_for(broken)
        await wait_for(lambda: process.metric("arks_controller_api_calls_total", outcome="Unreachable") > 0)
        alive(world)
        await asyncio.to_thread(api.start)
        proxy.heal()
    await over(world, mark)


@pytest.mark.parametrize("part", ["", "_etcd"], ids=["api-server", "etcd"])
async def test_a_frozen(world: World, part: str):
    api, process = world.room.api, world.process
    mark, lost = api.audit.mark(), seen(world, "leadership lost")
    async with Changing(world) as changing:
        await wait_for(lambda: changing.rounds)
        getattr(api, f"freeze{part}")()
        try:
            await wait_for(lambda: lost() and not process.leads)
            await wait_for(lambda: process.metric("arks_controller_watch_age_seconds", kind="ArksToken") > 1.0)
            alive(world)
        finally:
            getattr(api, f"thaw{part}")()
    await over(world, mark)


async def test_a_black_hole(world: World, proxy: TcpProxy):
    process = world.process
    mark, lost = world.room.api.audit.mark(), seen(world, "leadership lost")
    silent = seen(world, "watch broken", error="silent")
    async with Changing(world) as changing:
        await wait_for(lambda: changing.rounds)
        proxy.black_hole()
        try:
            await wait_for(lambda: lost() and not process.leads)
            await still(world.room)  # what the API server was given before is written, and in its log
            sent = len(writes(world.room))
            await wait_for(silent)
            alive(world)
            # Users go on, and nobody serves them.
            rounds = changing.rounds
            await wait_for(lambda: changing.rounds > rounds)
            assert len(writes(world.room)) == sent
        finally:
            proxy.heal()
    await over(world, mark)


@pytest.mark.parametrize("all_rights", [False, True], ids=["to-write", "all"])
async def test_rights_that_are_taken_away_and_given_back(world: World, proxy: TcpProxy, all_rights: bool):
    """Who may only renew the Lease leads on: it hears of every change, and every pass fails."""
    api, process = world.room.api, world.process
    mark, refused = api.audit.mark(), seen(world, "watch broken", error="403")
    calls = process.metric("arks_controller_api_calls_total", outcome="403")
    failed = process.metric("arks_controller_passes_total", outcome="failed")
    taken = {"ClusterRoleBinding", "RoleBinding"} if all_rights else {"ClusterRoleBinding"}
    bindings = [each for each in rbac() if each["kind"] in taken]
    async with Changing(world) as changing:
        await wait_for(lambda: changing.rounds)
        for each in bindings:
            api.delete(each["apiVersion"], each["kind"], SERVICE_ACCOUNT, each["metadata"].get("namespace", ""))
        if all_rights:
            await asyncio.to_thread(until_granted, api, "controller", granted=False)
            proxy.reset()  # who watches already is not asked again
            await wait_for(lambda: refused() and not process.leads)
        else:
            await wait_for(lambda: process.metric("arks_controller_passes_total", outcome="failed") > failed + 5)
            assert process.leads
        await wait_for(lambda: process.metric("arks_controller_api_calls_total", outcome="403") > calls + 10)
        alive(world)
        api.apply(*bindings)
    await over(world, mark)
