"""Deletions end, whatever finalizers Arks left and whatever is wrong with the object."""

from __future__ import annotations

import asyncio

import pytest

from controller.reconcile.finalizers import is_ours
from tests.reconcile.conftest import wait_for
from tests.reconcile.resources import APPLICATION, ENDPOINT, MODEL, PAIR, QUICKSTART, SINGLE, STORED_MODEL

OLD = {
    "ArksApplication": "application.arks.ai/controller",
    "ArksDisaggregatedApplication": "application.arks.ai/controller",
    "ArksEndpoint": "endpoint.arks.ai/controller",
    "ArksModel": "model.arks.ai/controller",
}


@pytest.mark.parametrize(
    ("kind", "name", "source"),
    [
        ("ArksApplication", "app-qwen", SINGLE),
        ("ArksDisaggregatedApplication", "pd", PAIR),
        ("ArksEndpoint", "qwen-7b", ENDPOINT),
        ("ArksModel", "qwen-7b", MODEL),
    ],
)
async def test_the_finalizers_of_arks_are_honoured(room, running, kind, name, source):
    room.apply(source)
    room.patch(kind, name, {"metadata": {"finalizers": [OLD[kind], "somebody.else/keeps"]}})
    room.delete(kind, name)
    left = await room.until(kind, name, lambda item: item["metadata"]["finalizers"] == ["somebody.else/keeps"])
    assert left["metadata"]["deletionTimestamp"]
    room.patch(kind, name, {"metadata": {"finalizers": None}})
    await room.gone(kind, name)


async def test_a_route_without_owner_goes_with_its_endpoint(room, running, gateway):
    room.apply(ENDPOINT)
    await room.until("HTTPRoute", "qwen-7b", lambda item: item["metadata"].get("ownerReferences"))
    room.patch("ArksEndpoint", "qwen-7b", {"metadata": {"finalizers": [OLD["ArksEndpoint"]]}})
    room.delete("ArksEndpoint", "qwen-7b")
    await asyncio.gather(room.gone("ArksEndpoint", "qwen-7b"), room.gone("HTTPRoute", "qwen-7b"))


async def test_what_was_made_goes_with_its_resource(room, running, actor, gateway):
    room.apply(QUICKSTART)
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    await running.quiet()
    for kind, name in (("ArksApplication", "app-qwen"), ("ArksEndpoint", "qwen-7b"), ("ArksModel", "qwen-7b")):
        assert not room.get(kind, name)["metadata"].get("finalizers")
        room.delete(kind, name)
    await asyncio.gather(
        room.gone("RoleBasedGroup", "app-qwen-0"),
        room.gone("Service", "arks-application-app-qwen"),
        room.gone("HTTPRoute", "qwen-7b"),
        room.gone("Job", "arks-worker-qwen-7b"),
    )


async def test_resources_deleted_and_made_anew_while_they_are_reconciled(room, running, actor, gateway):
    for _ in range(4):
        room.apply(STORED_MODEL, SINGLE, ENDPOINT)
        await asyncio.sleep(0.05)
        for kind, name in (("ArksApplication", "app-qwen"), ("ArksEndpoint", "qwen-7b"), ("ArksModel", "qwen-7b")):
            room.delete(kind, name)
    room.apply(STORED_MODEL, SINGLE, ENDPOINT)
    app = await room.phase("ArksApplication", "app-qwen", "Running")
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    service = await room.until(
        "Service",
        "arks-application-app-qwen",
        lambda item: item["metadata"]["ownerReferences"][0]["uid"] == app["metadata"]["uid"],
    )
    assert len(service["metadata"]["ownerReferences"]) == 1


async def test_a_foreground_deletion_makes_nothing_anew(room, running, actor):
    room.apply(STORED_MODEL, APPLICATION)
    await room.phase("ArksApplication", "app-qwen", "Running")
    room.patch("ArksApplication", "app-qwen", {"metadata": {"finalizers": ["test/holds"]}})
    room.delete("ArksApplication", "app-qwen")
    # Two watches: the Service's end must not come before its owner's deletion, which it never does for the collector.
    known = running.controller.watches.applications
    await wait_for(lambda: known.get((room.namespace, "app-qwen")).metadata.deletion_timestamp)
    await running.quiet()  # a pass that began before that is over
    room.delete("Service", "arks-application-app-qwen")
    await running.quiet()
    assert room.find("Service", "arks-application-app-qwen") is None
    room.patch("ArksApplication", "app-qwen", {"metadata": {"finalizers": None}})
    await room.gone("ArksApplication", "app-qwen")


def test_only_the_finalizers_of_arks_are_ours():
    assert is_ours("application.arks.ai/controller")
    assert is_ours("arks.ai/controller")
    assert not is_ours("evilarks.ai/controller")
    assert not is_ours("foregroundDeletion")
