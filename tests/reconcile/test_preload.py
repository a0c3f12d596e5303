"""Weights on chosen nodes: one download per node, a few at a time; nodes that come later are filled, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reconcile.conftest import condition
from tests.reconcile.resources import MODEL


@pytest.fixture
def nodes(room) -> Iterator:
    """Makes ready nodes with a label of this test's own."""
    made: list[str] = []

    def make(name: str) -> str:
        full = f"{name}-{room.namespace}"
        labels = {"pool": room.namespace, "kubernetes.io/hostname": full}
        (node,) = room.api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": full, "labels": labels}})
        room.api.set_status(node, conditions=[{"type": "Ready", "status": "True"}])
        made.append(full)
        return full

    yield make
    for name in made:
        room.api.delete("v1", "Node", name)


async def test_a_model_is_copied_onto_each_chosen_node_and_onto_later_ones(room, running, actor, nodes):
    first, second, third = (nodes(name) for name in ("a", "b", "c"))
    actor.loader = "hold"
    room.apply(
        MODEL,
        storage={"pvc": None, "hostPath": {"path": "/models"}},
        preload={"nodeSelector": {"pool": room.namespace}, "maxParallel": 2},
    )
    await room.until(
        "ArksModel",
        "qwen-7b",
        lambda item: "0 of 3 nodes" in condition(item, "ModelLoaded")["message"] and len(room.list("Job")) == 2,
        "two of three nodes are filled",
    )
    await running.quiet()
    jobs = room.list("Job")
    assert len(jobs) == 2
    selected = {job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] for job in jobs}
    assert selected <= {first, second, third}
    assert room.get("ArksModel", "qwen-7b")["status"]["phase"] == "ModelLoading"
    actor.loader = "succeed"
    await actor.again()
    ready = await room.phase("ArksModel", "qwen-7b", "Ready")
    assert ready["status"]["preloadedNodes"] == sorted([first, second, third])
    later = nodes("d")
    await room.until("ArksModel", "qwen-7b", lambda item: later in item["status"].get("preloadedNodes", ()))
    assert len(room.list("Job")) == 4


async def test_no_node_that_matches_is_said(room, running, nodes):
    room.apply(
        MODEL,
        storage={"pvc": None, "hostPath": {"path": "/models"}},
        preload={"nodeSelector": {"pool": room.namespace}},
    )
    found = await room.condition("ArksModel", "qwen-7b", "ModelLoaded", "False", "Waiting")
    assert "spec.preload.nodeSelector" in found["message"]
