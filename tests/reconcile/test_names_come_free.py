"""A name that we had once is anybody's afterwards."""

from __future__ import annotations

from tests.reconcile.resources import SINGLE, STORED_MODEL

SERVICE = "arks-application-app-qwen"


async def test_a_strangers_object_under_a_name_that_we_once_had_is_not_taken(room, running, actor):
    room.apply(STORED_MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    room.delete("ArksApplication", "app-qwen")
    # Whoever hears of the Service's end before its owner's makes it anew, and the collector takes it once more.
    await running.quiet()
    await room.gone("Service", SERVICE)
    await running.quiet()
    spec = {"selector": {"app": "shop"}, "ports": [{"name": "web", "port": 80}]}
    (before,) = room.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE}, "spec": spec})
    room.apply(SINGLE)
    found = await room.condition("ArksApplication", "app-qwen", "Ready", "False", "UnderlayReconcileFailed")
    assert f"{SERVICE}: an object of this name is not ours" in found["message"]
    assert room.get("Service", SERVICE)["spec"] == before["spec"]
