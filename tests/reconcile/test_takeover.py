"""Objects that Arks' own operator made, under its own field manager, become ours whole and in place."""

from __future__ import annotations

from typing import Any

from tests.reconcile.resources import ENDPOINT, PAIR, SINGLE, STORED_MODEL


def as_arks(room, item: dict[str, Any]) -> dict[str, Any]:
    """Made by a plain create of the manager that Arks' binary is known by."""
    item["metadata"]["namespace"] = room.namespace
    path = room.api.path(item["apiVersion"], item["kind"], room.namespace)
    return room.api.request("POST", f"{path}?fieldManager=manager", item)


def managers(item):
    return {
        (entry["manager"], entry["operation"])
        for entry in item["metadata"]["managedFields"]
        if not entry.get("subresource")
    }


def owner(app):
    meta = app["metadata"]
    return {
        "apiVersion": "arks.ai/v1",
        "kind": app["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


async def test_a_service_of_arks_keeps_its_address_and_loses_what_we_do_not_want(room, running, actor):
    (app,) = room.apply(SINGLE)
    made = as_arks(
        room,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "arks-application-app-qwen",
                "labels": {"prometheus-discovery": "true", "managed-by": "arks", "stale": "label"},
                "ownerReferences": [owner(app)],
            },
            "spec": {
                "selector": {"arks.ai/application": "app-qwen", "stale": "selector"},
                "ports": [{"name": "http", "port": 8080}, {"name": "stale", "port": 9999}],
            },
        },
    )
    room.apply(STORED_MODEL)
    found = await room.until(
        "Service", "arks-application-app-qwen", lambda item: ("arks-controller", "Apply") in managers(item)
    )
    await room.phase("ArksApplication", "app-qwen", "Running")
    found = room.get("Service", "arks-application-app-qwen")
    assert found["metadata"]["uid"] == made["metadata"]["uid"]
    assert found["spec"]["clusterIP"] == made["spec"]["clusterIP"]
    assert found["spec"]["selector"] == {"arks.ai/application": "app-qwen", "arks.ai/work-load-role": "leader"}
    assert [port["port"] for port in found["spec"]["ports"]] == [8080]
    assert "stale" not in found["metadata"]["labels"]
    assert ("manager", "Update") not in managers(found)


async def test_a_workload_of_arks_stays_what_it_is_and_loses_old_arguments(room, running, actor):
    (app,) = room.apply(SINGLE)
    made = as_arks(
        room,
        {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {
                "name": "app-qwen",
                "labels": {"arks.ai/application": "app-qwen"},
                "ownerReferences": [owner(app)],
            },
            "spec": {
                "replicas": 0,
                "networkConfig": {"subdomainPolicy": "Shared"},
                "leaderWorkerTemplate": {
                    "size": 1,
                    "leaderTemplate": {"spec": {"containers": [{"name": "leader", "image": "old"}]}},
                    "workerTemplate": {"spec": {"containers": [{"name": "worker", "image": "old"}], "stale": True}},
                },
            },
        },
    )
    room.apply(STORED_MODEL)
    await room.phase("ArksApplication", "app-qwen", "Running")
    found = room.get("LeaderWorkerSet", "app-qwen")
    assert found["metadata"]["uid"] == made["metadata"]["uid"]
    assert "networkConfig" not in found["spec"]
    assert "stale" not in str(found["spec"])
    assert room.get("ArksApplication", "app-qwen")["status"]["driver"] == "lws"
    assert not room.list("RoleBasedGroup")


async def test_a_route_of_arks_gets_an_owner(room, running, gateway):
    match = [{"type": "Exact", "name": "namespace", "value": room.namespace}]
    match.append({"type": "Exact", "name": "model", "value": "qwen-7b"})
    made = as_arks(
        room,
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "qwen-7b"},
            "spec": {
                "parentRefs": [{"name": "arks-eg"}],
                "hostnames": ["stale.example"],
                "rules": [{"matches": [{"headers": match}]}],
            },
        },
    )
    room.apply(ENDPOINT)
    found = await room.until("HTTPRoute", "qwen-7b", lambda item: item["metadata"].get("ownerReferences"))
    assert found["metadata"]["uid"] == made["metadata"]["uid"]
    assert "hostnames" not in found["spec"]
    await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "True")


async def test_a_set_of_arks_goes_without_its_groups_and_they_serve_on(room, actor):
    """The set is deleted as an orphaner; its group is adopted, its pods replaced by a rolling step."""
    from tests.reconcile.conftest import Running

    (app,) = room.apply(SINGLE)
    label = {"arks.ai/application": "app-qwen"}
    the_set = as_arks(
        room,
        {
            "apiVersion": "workloads.x-k8s.io/v1alpha2",
            "kind": "RoleBasedGroupSet",
            "metadata": {"name": "app-qwen", "labels": label, "ownerReferences": [owner(app)]},
            "spec": {"replicas": 1},
        },
    )
    pod = {"metadata": {"labels": label}, "spec": {"containers": [{"name": "instance", "image": "old"}]}}
    group = as_arks(
        room,
        {
            "apiVersion": "workloads.x-k8s.io/v1alpha2",
            "kind": "RoleBasedGroup",
            "metadata": {
                "name": "app-qwen-0",
                "ownerReferences": [
                    {**owner(the_set), "apiVersion": the_set["apiVersion"], "kind": "RoleBasedGroupSet"}
                ],
            },
            "spec": {
                "stale": True,
                "roles": [{"name": "inference", "standalonePattern": {"template": pod}}],
            },
        },
    )
    room.apply(STORED_MODEL)
    running = Running(room.api, room.namespace)
    await running.start()
    try:
        await room.gone("RoleBasedGroupSet", "app-qwen")
        adopted = await room.until(
            "RoleBasedGroup",
            "app-qwen-0",
            lambda item: [each["kind"] for each in item["metadata"].get("ownerReferences", ())] == ["ArksApplication"],
        )
        assert adopted["metadata"]["uid"] == group["metadata"]["uid"]
        assert "stale" not in adopted["spec"]
        await room.phase("ArksApplication", "app-qwen", "Running")
    finally:
        await running.stop()


async def test_the_routers_old_deployment_goes_when_the_new_one_serves(room, running, actor):
    """Arks' router selected every pod of the application, so it cannot be kept; traffic moves first."""
    (app,) = room.apply(PAIR)
    label = {"arks.ai/application": "pd"}
    for half in ("prefill", "decode"):
        container = {"name": "main", "image": "old"}
        template = {"metadata": {"labels": label}, "spec": {"containers": [container]}}
        as_arks(
            room,
            {
                "apiVersion": "leaderworkerset.x-k8s.io/v1",
                "kind": "LeaderWorkerSet",
                "metadata": {"name": f"pd-{half}", "labels": label, "ownerReferences": [owner(app)]},
                "spec": {
                    "replicas": 1,
                    "leaderWorkerTemplate": {"size": 1, "leaderTemplate": template, "workerTemplate": template},
                },
            },
        )
    as_arks(
        room,
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "pd-router", "labels": label, "ownerReferences": [owner(app)]},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": label},
                "template": {"metadata": {"labels": label}, "spec": {"containers": [{"name": "r", "image": "old"}]}},
            },
        },
    )
    actor.serving = lambda pod: pod["metadata"]["labels"].get("arks.ai/disaggregation-role") != "router"
    room.apply(STORED_MODEL)
    await room.until("Deployment", "pd-scheduler", lambda item: item["status"].get("replicas"))
    await running.quiet()
    assert room.find("Deployment", "pd-router") is not None
    actor.serving = lambda _pod: True
    await actor.again()
    await room.gone("Deployment", "pd-router")
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
