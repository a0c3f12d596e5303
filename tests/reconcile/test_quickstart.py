"""Arks' own quickstart, from `kubectl apply` to a route with backends: each kind walks through its phases."""

from __future__ import annotations

from tests.reconcile.conftest import condition
from tests.reconcile.resources import QUICKSTART


async def test_the_quickstart_of_arks_serves(room, running, actor, gateway):
    actor.loader = "hold"
    room.apply(QUICKSTART)

    await room.phase("ArksModel", "qwen-7b", "ModelLoading")
    waiting = await room.phase("ArksApplication", "app-qwen", "Loading")
    assert condition(waiting, "Loaded")["reason"] == "ModelLoading"
    assert room.find("PersistentVolumeClaim", "qwen-7b") is not None
    assert room.find("Job", "arks-worker-qwen-7b") is not None
    assert not room.list("RoleBasedGroup")
    programmed = await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "False", "NoBackends")
    assert "qwen-7b" in programmed["message"]

    actor.serving = lambda _pod: False
    actor.loader = "succeed"
    actor.message = '{"state":"ready","model":"Qwen","source":"huggingface","revision":"abc123"}'
    await actor.again()
    # The revision is its pod's word, readiness its Job's; which of them is heard first is chance.
    await room.phase("ArksModel", "qwen-7b", "Ready")
    model = await room.until("ArksModel", "qwen-7b", lambda item: item["status"]["revision"] == "abc123")
    assert [(each["type"], each["status"]) for each in model["status"]["conditions"]] == [
        ("StorageCreated", "True"),
        ("ModelLoaded", "True"),
        ("Ready", "True"),
    ]
    creating = await room.phase("ArksApplication", "app-qwen", "Creating")
    assert [(each["type"], each["status"]) for each in creating["status"]["conditions"]] == [
        ("Precheck", "True"),
        ("Loaded", "True"),
        ("Ready", "False"),
    ]
    assert not room.get("HTTPRoute", "qwen-7b")["spec"]["rules"][0].get("backendRefs")

    actor.serving = lambda _pod: True
    await actor.again()
    app = await room.phase("ArksApplication", "app-qwen", "Running")
    status = app["status"]
    assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (1, 1, 1)
    assert status["observedGeneration"] == app["metadata"]["generation"]
    assert status["driver"] == "rbg"
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    endpoint = room.get("ArksEndpoint", "qwen-7b")
    (backend,) = endpoint["status"]["routes"]
    assert (backend["name"], backend["port"], backend["weight"]) == ("arks-application-app-qwen", 8080, 5)
    route = room.get("HTTPRoute", "qwen-7b")
    assert route["spec"]["rules"][0]["backendRefs"][0]["name"] == "arks-application-app-qwen"
    for kind, name in (("ArksToken", "example-token"), ("ArksQuota", "basic-quota"), ("ArksEndpoint", "qwen-7b")):
        await room.condition(kind, name, "Accepted", "True")
    await room.event("app-qwen", "Normal", "Running")
    assert room.secret not in str(room.api.list("v1", "Event", room.namespace))
