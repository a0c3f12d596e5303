"""One test for each defect of Arks that lies in its loops; the number is its place in the inventory."""

from __future__ import annotations

import asyncio

from tests.reconcile.conftest import condition
from tests.reconcile.resources import APPLICATION, ENDPOINT, MODEL, PAIR, SINGLE, STORED_MODEL


def backends(item):
    return [each["name"] for each in item.get("status", {}).get("routes", ())]


async def test_defect_08_two_replicas_are_routed_and_none_is_not(room, running, actor, gateway):
    room.apply(STORED_MODEL, ENDPOINT)
    room.apply(SINGLE, replicas=2)
    await room.until("ArksApplication", "app-qwen", lambda app: app.get("status", {}).get("readyReplicas") == 2)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    room.patch("ArksApplication", "app-qwen", {"spec": {"replicas": 0}})
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "False", "NoBackends")
    scaled = await room.until("ArksApplication", "app-qwen", lambda app: app["status"]["readyReplicas"] == 0)
    assert scaled["status"]["phase"] == "Running"
    assert condition(scaled, "Ready")["reason"] == "ScaledToZero"


async def test_defect_09_workers_of_a_group_are_behind_no_service(room, running, actor, gateway):
    room.apply(STORED_MODEL, APPLICATION, ENDPOINT)
    await room.phase("ArksApplication", "app-qwen", "Running")
    assert sorted(pod["metadata"]["name"] for pod in room.list("Pod")) == [
        "app-qwen-0-inference-0",
        "app-qwen-0-inference-0-1",
    ]

    selector = room.get("Service", "arks-application-app-qwen")["spec"]["selector"]
    query = ",".join(f"{key}={value}" for key, value in selector.items())
    path = f"{room.api.path('v1', 'Pod', room.namespace)}?labelSelector={query}"
    found = room.api.request("GET", path)["items"]
    assert [pod["metadata"]["name"] for pod in found] == ["app-qwen-0-inference-0"]


async def test_defect_11_failed_is_left_as_soon_as_its_cause_is(room, running, actor):
    room.apply(SINGLE)
    failed = await room.phase("ArksApplication", "app-qwen", "Failed")
    assert condition(failed, "Loaded")["reason"] == "ModelNotExist"
    await room.event("app-qwen", "Warning", "ModelNotExist")
    room.apply(STORED_MODEL)
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_defect_11_a_spec_that_was_refused_heals_when_it_is_edited(room, running, actor):
    room.apply(STORED_MODEL)
    room.apply(SINGLE, runtime="tensorrt")
    failed = await room.phase("ArksApplication", "app-qwen", "Failed")
    assert condition(failed, "Precheck")["reason"] == "RuntimeNotSupport"
    room.patch("ArksApplication", "app-qwen", {"spec": {"runtime": "vllm"}})
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_defect_11_a_failed_download_is_tried_again_and_its_application_follows(room, running, actor):
    actor.loader, actor.message = "fail", '{"state":"failed","field":"spec.model","message":"no such repository"}'
    room.apply(MODEL, SINGLE)
    # That it failed is its Job's word, why its pod's; which of them is heard first is chance.
    await room.phase("ArksModel", "qwen-7b", "Failed")
    await room.until(
        "ArksModel",
        "qwen-7b",
        lambda model: condition(model, "ModelLoaded")["message"] == "spec.model: no such repository",
    )
    await room.phase("ArksApplication", "app-qwen", "Failed")
    await room.until(
        "ArksApplication", "app-qwen", lambda app: "no such repository" in condition(app, "Loaded")["message"]
    )
    actor.loader, actor.message = "succeed", ""
    # A Job's template cannot be changed: the corrected request gets a Job of its own.
    room.patch("ArksModel", "qwen-7b", {"spec": {"model": "Qwen/Qwen2.5-7B-Instruct"}})
    await room.phase("ArksModel", "qwen-7b", "Ready")
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_defect_12_a_pipeline_is_withdrawn_with_either_half_and_comes_back(room, running, actor, gateway):
    room.apply(STORED_MODEL, PAIR, ENDPOINT)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    whole = {"router": 1, "prefill": 1, "decode": 2}
    await room.until(
        "ArksDisaggregatedApplication",
        "pd",
        lambda pair: {role: pair["status"][role]["readyReplicas"] for role in whole} == whole,
        "all replicas are ready",
    )
    for half in ("prefill", "decode", "router"):
        actor.serving = lambda pod, half=half: pod["metadata"]["labels"].get("arks.ai/disaggregation-role") != half
        await actor.again()
        await room.until("ArksEndpoint", "qwen-7b", lambda endpoint: not backends(endpoint), f"without {half}")
        actor.serving = lambda _pod: True
        await actor.again()
        await room.until("ArksEndpoint", "qwen-7b", backends, f"with {half} again")


async def test_defect_12_an_endpoint_follows_a_changed_served_name(room, running, actor, gateway):
    room.apply(STORED_MODEL, SINGLE, ENDPOINT)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    room.patch("ArksApplication", "app-qwen", {"spec": {"servedModelName": "other"}})
    await room.until(
        "ArksEndpoint", "qwen-7b", lambda endpoint: not backends(endpoint), "the old name lost its backend"
    )


async def test_defect_13_running_means_serving_and_ends_with_it(room, running, actor):
    actor.serving = lambda _pod: False
    room.apply(STORED_MODEL, SINGLE)
    await room.until("ArksApplication", "app-qwen", lambda app: app.get("status", {}).get("replicas") == 1)
    assert room.get("ArksApplication", "app-qwen")["status"]["phase"] == "Creating"
    actor.serving = lambda _pod: True
    await actor.again()
    await room.phase("ArksApplication", "app-qwen", "Running")
    actor.serving = lambda _pod: False
    await actor.again()
    gone = await room.phase("ArksApplication", "app-qwen", "Creating")
    assert condition(gone, "Ready")["reason"] == "ReplicasNotReady"


async def test_defect_20_a_claim_without_a_name_is_the_models_everywhere(room, running, actor):
    room.apply(STORED_MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    assert room.find("PersistentVolumeClaim", "qwen-7b") is not None
    group = room.get("RoleBasedGroup", "app-qwen-0")
    assert "'claimName': 'qwen-7b'" in str(group["spec"])


async def test_defect_20_a_model_without_storage_is_a_condition(room, running):
    room.apply(STORED_MODEL, storage=None)
    found = await room.condition("ArksModel", "qwen-7b", "StorageCreated", "False", "CreateFailed")
    assert "spec.storage" in found["message"]


async def test_defect_22_a_foreign_route_is_left_alone_and_named(room, running, gateway):
    foreign = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "qwen-7b"},
        "spec": {"parentRefs": [{"name": "arks-eg"}], "hostnames": ["shop.example"]},
    }
    (before,) = room.apply(foreign)
    room.apply(ENDPOINT)
    found = await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "False", "RouteConflict")
    assert "metadata.name" in found["message"]
    await room.event("qwen-7b", "Warning", "RouteConflict")
    room.delete("ArksEndpoint", "qwen-7b")
    await room.gone("ArksEndpoint", "qwen-7b")
    await running.quiet()
    assert room.get("HTTPRoute", "qwen-7b")["spec"] == before["spec"]


async def test_defect_22_a_foreign_route_that_goes_makes_room(room, running, gateway):
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "qwen-7b"},
        "spec": {"parentRefs": [{"name": "arks-eg"}]},
    }
    room.apply(route)
    room.apply(ENDPOINT)
    await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "False", "RouteConflict")
    room.delete("HTTPRoute", "qwen-7b")
    await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "True")
    ours = await room.until("HTTPRoute", "qwen-7b", lambda item: item["metadata"].get("ownerReferences"))
    assert ours["metadata"]["ownerReferences"][0]["kind"] == "ArksEndpoint"


async def test_defect_22_deleted_services_and_routes_come_back(room, running, actor, gateway):
    room.apply(STORED_MODEL, SINGLE, ENDPOINT)
    await room.until("ArksEndpoint", "qwen-7b", backends)
    for kind, name in (("Service", "arks-application-app-qwen"), ("HTTPRoute", "qwen-7b")):
        old = room.get(kind, name)["metadata"]["uid"]
        room.delete(kind, name)
        await room.until(kind, name, lambda item, old=old: item["metadata"]["uid"] != old, "it came back")


async def test_defect_22_seventeen_backends_are_no_error(room, running, gateway):
    own = [{"name": f"backend-{index}", "port": 80} for index in range(16)]
    room.apply(ENDPOINT, routeConfigs=own)
    found = await room.until("ArksEndpoint", "qwen-7b", backends)
    assert len(found["status"]["routes"]) == 16


async def test_defect_23_the_routers_permissions_come_back_one_by_one_and_go_with_it(room, running, actor):
    room.apply(STORED_MODEL, PAIR)
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        old = room.get(kind, "arks-router-pd")["metadata"]["uid"]
        room.delete(kind, "arks-router-pd")
        await room.until(kind, "arks-router-pd", lambda item, old=old: item["metadata"]["uid"] != old, "it came back")
    room.delete("ArksDisaggregatedApplication", "pd")
    await asyncio.gather(*(room.gone(kind, "arks-router-pd") for kind in ("ServiceAccount", "Role", "RoleBinding")))


async def test_defect_26_tokens_with_one_secret_are_both_told_and_healed(room, running):
    token = {
        "apiVersion": "arks.ai/v1",
        "kind": "ArksToken",
        "metadata": {"name": "first"},
        "spec": {"token": "sk-one-secret", "qos": []},
    }
    room.apply(token)
    await room.condition("ArksToken", "first", "Accepted", "True")
    room.apply({**token, "metadata": {"name": "second"}})
    for name, other in (("first", "second"), ("second", "first")):
        found = await room.condition("ArksToken", name, "Accepted", "False", "DuplicateSecret")
        assert other in found["message"]
        assert "sk-one-secret" not in found["message"]
    room.delete("ArksToken", "second")
    await room.condition("ArksToken", "first", "Accepted", "True")


async def test_defect_31_a_changed_model_is_mounted_when_it_is_ready_and_the_old_one_serves_on(room, running, actor):
    room.apply(STORED_MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    before = room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"]
    actor.loader = "hold"
    room.apply(MODEL.replace("name: qwen-7b", "name: bigger"))
    room.patch("ArksApplication", "app-qwen", {"spec": {"model": {"name": "bigger"}}})
    waiting = await room.until(
        "ArksApplication", "app-qwen", lambda app: condition(app, "Loaded")["reason"] == "ModelLoading"
    )
    assert waiting["status"]["phase"] == "Running"
    await running.quiet()
    assert room.get("RoleBasedGroup", "app-qwen-0")["metadata"]["generation"] == before
    actor.loader = "succeed"
    await actor.again()
    await room.until("RoleBasedGroup", "app-qwen-0", lambda group: group["metadata"]["generation"] > before)
    await room.until("ArksApplication", "app-qwen", lambda app: app["status"]["updatedReplicas"] == 1)
    await room.phase("ArksApplication", "app-qwen", "Running")
