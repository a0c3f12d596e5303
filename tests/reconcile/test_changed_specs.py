"""A spec that is changed while it serves: another workload, another runtime. Traffic never waits for what is new, and
nothing of what was stays."""

from __future__ import annotations

import asyncio

import pytest

from tests.reconcile.conftest import condition
from tests.reconcile.resources import ENDPOINT, MODEL, PAIR, SINGLE, STORED_MODEL

ETCD = [{"name": "ETCD_ENDPOINTS", "value": "http://etcd:2379"}]


def backends(endpoint):
    return endpoint.get("status", {}).get("routes", [])


def on(source, workload):
    return source.replace("{name: app-qwen}", f"{{name: app-qwen, annotations: {{arks.ai/workload: {workload}}}}}")


def runs(pod, word):
    return word in " ".join(pod["spec"]["containers"][0]["command"])


async def serves(room):
    """As the application and its endpoint see it."""
    app = await room.phase("ArksApplication", "app-qwen", "Running")
    assert app["status"]["readyReplicas"] >= 1
    assert backends(room.get("ArksEndpoint", "qwen-7b"))


async def no_more_than(room, kind, names):
    for name in {item["metadata"]["name"] for item in room.list(kind)} - set(names):
        await room.gone(kind, name)


async def test_an_application_moves_to_another_workload_without_a_pause(room, running, actor, gateway):
    """One pod to two needs a group; an annotation can ask for another API at any time."""
    made = {"deployment": "Deployment", "rbg": "RoleBasedGroup", "lws": "LeaderWorkerSet"}
    before = "deployment"
    room.apply(STORED_MODEL, on(SINGLE, before), ENDPOINT)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    for workload, size in (("rbg", 2), ("lws", 2), ("deployment", 1)):
        known = {pod["metadata"]["uid"] for pod in room.list("Pod")}
        actor.serving = lambda pod, known=known: pod["metadata"]["uid"] in known
        annotation = {"annotations": {"arks.ai/workload": workload}}
        spec = {"size": size, "tensorParallelSize": size}
        room.patch("ArksApplication", "app-qwen", {"metadata": annotation, "spec": spec})
        await room.until("ArksApplication", "app-qwen", lambda app, to=workload: app["status"]["driver"] == to)
        await running.quiet()
        await serves(room)
        assert room.list(made[before])
        actor.serving = lambda _pod: True
        await actor.again()
        await no_more_than(room, made[before], ())
        await serves(room)
        before = workload


@pytest.mark.parametrize("workload", ["deployment", "rbg"])
async def test_frontends_come_and_go_with_the_runtime_that_needs_them(room, running, actor, gateway, workload):
    room.apply(STORED_MODEL, ENDPOINT)
    room.apply(on(SINGLE, workload), replicas=2)
    await room.until("ArksApplication", "app-qwen", lambda app: app.get("status", {}).get("readyReplicas") == 2)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    actor.serving = lambda pod: not runs(pod, "dynamo")
    room.patch("ArksApplication", "app-qwen", {"spec": {"runtime": "dynamo", "instanceSpec": {"env": ETCD}}})
    await room.until("Deployment", "app-qwen-frontend", lambda item: item["status"].get("replicas"))
    await running.quiet()
    await serves(room)  # by an engine of before: no group was changed that was needed

    actor.serving = lambda pod: not runs(pod, "dynamo.frontend")
    await actor.again()
    await room.phase("ArksApplication", "app-qwen", "Creating")  # what answers is a frontend, and none does
    actor.serving = lambda _pod: True
    await actor.again()
    await room.until(
        "ArksApplication", "app-qwen", lambda app: "frontend 2/2" in condition(app, "Ready")["message"], "all answer"
    )

    actor.serving = lambda pod: runs(pod, "dynamo")
    room.patch("ArksApplication", "app-qwen", {"spec": {"runtime": "vllm", "instanceSpec": {"env": None}}})
    await room.until("ArksApplication", "app-qwen", lambda app: app["status"].get("observedGeneration") == 3)
    await running.quiet()
    await serves(room)
    actor.serving = lambda _pod: True
    await actor.again()
    await room.gone("Deployment", "app-qwen-frontend")
    await serves(room)
    await no_more_than(room, "Deployment", ("app-qwen",))


async def test_the_permissions_of_a_router_go_with_the_runtime_that_needed_them(room, running, actor):
    room.apply(STORED_MODEL, PAIR)
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
    parts = {part: {"instanceSpec": {"env": ETCD}} for part in ("router", "prefill", "decode")}
    room.patch("ArksDisaggregatedApplication", "pd", {"spec": {"runtime": "dynamo", **parts}})
    await room.until("ArksDisaggregatedApplication", "pd", lambda pair: pair["status"]["observedGeneration"] == 2)
    await room.condition("ArksDisaggregatedApplication", "pd", "Precheck", "True")
    await asyncio.gather(*(room.gone(kind, "arks-router-pd") for kind in ("ServiceAccount", "Role", "RoleBinding")))
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")


@pytest.mark.parametrize("change", [{"model": "Qwen/Other"}, {"storage": {"pvc": {"name": "second"}}}], ids=str)
async def test_a_model_that_is_changed_in_place_is_loaded_first_and_then_run(room, running, actor, change):
    room.apply(MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    before = room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"]
    actor.loader = "hold"
    room.patch("ArksModel", "qwen-7b", {"spec": change})
    await room.phase("ArksModel", "qwen-7b", "ModelLoading")
    await running.quiet()
    assert room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"] == before
    assert room.get("ArksApplication", "app-qwen")["status"]["phase"] == "Running"
    actor.loader = "succeed"
    await actor.again()
    await room.until("RoleBasedGroup", "app-qwen-0", lambda group: group["metadata"]["generation"] > before, "rolled")
    await room.until("ArksApplication", "app-qwen", lambda app: app["status"]["updatedReplicas"] == 1)


async def test_the_same_weights_from_a_mirror_restart_nothing(room, running, actor):
    room.apply(MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    before = room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"]
    mirror = {"source": {"huggingface": {"endpoint": "https://mirror.example"}}}
    room.patch("ArksModel", "qwen-7b", {"spec": mirror})
    await room.until(
        "ArksModel",
        "qwen-7b",
        lambda item: item["status"]["observedGeneration"] == 2 and item["status"]["phase"] == "Ready",
    )
    await running.quiet()
    assert room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"] == before


async def test_what_a_claim_cannot_change_is_said(room, running):
    room.apply(STORED_MODEL)
    await room.phase("ArksModel", "qwen-7b", "Ready")
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": {"accessModes": ["ReadWriteMany"]}}}}})
    told = await room.condition("ArksModel", "qwen-7b", "Degraded", "True", "ClaimUnchangeable")
    assert told["message"].startswith("spec.storage.pvc.spec.accessModes: the claim qwen-7b ")
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": {"accessModes": ["ReadWriteOnce"]}}}}})
    await room.until("ArksModel", "qwen-7b", lambda item: condition(item, "Degraded") is None, "it is as it was")
