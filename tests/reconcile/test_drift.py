"""What somebody else changes is put right; what somebody else owns is left alone."""

from __future__ import annotations

import pytest

from tests.reconcile.conftest import condition
from tests.reconcile.resources import ENDPOINT, MODEL, SINGLE, STORED_MODEL

DEPLOYED = SINGLE.replace("{name: app-qwen}", "{name: app-qwen, annotations: {arks.ai/workload: deployment}}")
GROUPED = SINGLE.replace("{name: app-qwen}", "{name: app-qwen, annotations: {arks.ai/workload: lws}}")


@pytest.mark.parametrize(
    ("kind", "name", "patch", "right"),
    [
        (
            "Service",
            "arks-application-app-qwen",
            {"spec": {"selector": {"arks.ai/work-load-role": "worker"}}},
            lambda item: item["spec"]["selector"]["arks.ai/work-load-role"] == "leader",
        ),
        (
            "HTTPRoute",
            "qwen-7b",
            {"spec": {"rules": [{"timeouts": {"request": "1s"}}]}},
            lambda item: item["spec"]["rules"][0].get("backendRefs", [{}])[0].get("weight") == 5,
        ),
        ("Deployment", "app-qwen", {"spec": {"replicas": 0}}, lambda item: item["spec"]["replicas"] == 1),
        (
            "Service",
            "arks-application-app-qwen",
            {"metadata": {"labels": {"arks.ai/application": None}}},
            lambda item: item["metadata"]["labels"]["arks.ai/application"] == "app-qwen",
        ),
    ],
    ids=["service", "route", "deployment", "label-we-watch-by"],
)
async def test_a_changed_object_is_put_right(room, running, actor, gateway, kind, name, patch, right):
    room.apply(STORED_MODEL, DEPLOYED, ENDPOINT)
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    await running.quiet()
    changed = room.patch(kind, name, patch)
    await room.until(
        kind,
        name,
        lambda item: item["metadata"]["resourceVersion"] != changed["metadata"]["resourceVersion"] and right(item),
    )


@pytest.mark.parametrize(("kind", "source"), [("Deployment", DEPLOYED), ("LeaderWorkerSet", GROUPED)])
async def test_a_deleted_workload_comes_back(room, running, actor, kind, source):
    room.apply(STORED_MODEL, source)
    await room.phase("ArksApplication", "app-qwen", "Running")
    old = room.get(kind, "app-qwen")["metadata"]["uid"]
    room.delete(kind, "app-qwen")
    await room.until(kind, "app-qwen", lambda item: item["metadata"]["uid"] != old)
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_fields_of_others_on_our_objects_stay(room, running, actor):
    room.apply(STORED_MODEL, DEPLOYED)
    await room.phase("ArksApplication", "app-qwen", "Running")
    room.patch("Service", "arks-application-app-qwen", {"metadata": {"annotations": {"mesh": "on"}}})
    room.patch("ArksApplication", "app-qwen", {"spec": {"instanceSpec": {"labels": {"a": "b"}}}})
    await room.until(
        "Deployment", "app-qwen", lambda item: item["spec"]["template"]["metadata"]["labels"].get("a") == "b"
    )
    await running.quiet()
    assert room.get("Service", "arks-application-app-qwen")["metadata"]["annotations"]["mesh"] == "on"


@pytest.mark.parametrize("kind", ["Deployment", "Service"])
async def test_a_strangers_object_of_the_same_name_is_not_taken(room, running, actor, kind):
    labels = {"app": "shop"}
    name = "app-qwen" if kind == "Deployment" else "arks-application-app-qwen"
    spec = {"selector": labels, "ports": [{"port": 80}]}
    if kind == "Deployment":
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "shop", "image": "shop"}]}}
        spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": template}
    version = "apps/v1" if kind == "Deployment" else "v1"
    (before,) = room.apply({"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec})
    room.apply(STORED_MODEL, DEPLOYED)
    found = await room.condition("ArksApplication", "app-qwen", "Ready", "False", "UnderlayReconcileFailed")
    assert name in found["message"]
    assert (await room.phase("ArksApplication", "app-qwen", "Failed"))["status"]["readyReplicas"] == 0
    assert room.get(kind, name)["spec"] == before["spec"]
    await room.event("app-qwen", "Warning", "UnderlayReconcileFailed")


async def test_a_claim_that_exists_is_used_and_never_deleted(room, running, actor):
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "qwen-7b"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    (before,) = room.apply(claim)
    room.apply(MODEL)
    model = await room.phase("ArksModel", "qwen-7b", "Ready")
    assert condition(model, "StorageCreated")["status"] == "True"
    room.delete("ArksModel", "qwen-7b")
    await room.gone("ArksModel", "qwen-7b")
    await running.quiet()
    after = room.get("PersistentVolumeClaim", "qwen-7b")
    assert (after["spec"], after["metadata"].get("ownerReferences")) == (before["spec"], None)


async def test_a_change_rolls_without_ever_taking_the_last_replica_down(room, running, actor):
    room.apply(STORED_MODEL)
    room.apply(SINGLE, replicas=2)
    await room.until("ArksApplication", "app-qwen", lambda app: app.get("status", {}).get("readyReplicas") == 2)
    fewest = 2

    def ready():
        pods = [pod for pod in room.list("Pod") if "deletionTimestamp" not in pod["metadata"]]
        return sum((condition(pod, "Ready") or {}).get("status") == "True" for pod in pods)

    room.patch("ArksApplication", "app-qwen", {"spec": {"runtimeCommonArgs": ["--max-model-len", "4096"]}})

    def rolled(app):
        nonlocal fewest
        fewest = min(fewest, ready())
        updated = app["status"]["updatedReplicas"] == app["status"]["readyReplicas"] == 2
        return updated and app["status"]["observedGeneration"] == app["metadata"]["generation"]

    await room.until("ArksApplication", "app-qwen", rolled)
    groups = room.list("RoleBasedGroup")
    assert all("--max-model-len" in str(group["spec"]) for group in groups)
    assert fewest >= 1
