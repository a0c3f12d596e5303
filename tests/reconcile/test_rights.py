"""The rights that the manifests grant are enough for everything that the loops do."""

from __future__ import annotations

from controller.permissions import NAMESPACE, PERMISSIONS
from tests.harness.rights import grant
from tests.reconcile.conftest import Running
from tests.reconcile.resources import PAIR, QUICKSTART


async def test_the_granted_rights_are_enough_for_the_quickstart_and_a_pair(room, actor, gateway):
    grant(room.api)
    running = Running(room.api, NAMESPACE)
    await running.start(user="controller")
    try:
        room.apply(QUICKSTART, PAIR)
        room.patch("ArksEndpoint", "qwen-7b", {"metadata": {"finalizers": ["endpoint.arks.ai/controller"]}})
        await room.phase("ArksApplication", "app-qwen", "Running")
        await room.phase("ArksDisaggregatedApplication", "pd", "Running")
        await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
        room.patch("ArksModel", "qwen-7b", {"spec": {"model": "another/one"}})
        await room.until(
            "ArksModel",
            "qwen-7b",
            lambda item: (
                item["status"].get("observedGeneration") == item["metadata"]["generation"]
                and item["status"]["phase"] == "Ready"
            ),
        )
        room.delete("ArksEndpoint", "qwen-7b")
        await room.gone("ArksEndpoint", "qwen-7b")
        await running.quiet()
        calls = running.client.stats.calls
        assert not [call for call in calls if call[3] == "403"]
        granted = {(verb, each.group, what) for each in PERMISSIONS for verb in each.verbs for what in each.resources}
        used = {call[:3] for call in calls if not call[2].startswith("/")}
        assert used <= granted
    finally:
        await running.stop()
