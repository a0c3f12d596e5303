"""What the schema admits and the world does not: a condition that names the field, an Event, and nobody else hurt."""

from __future__ import annotations

import pytest

from tests.harness.kubernetes import KubeError
from tests.reconcile.conftest import wait_for
from tests.reconcile.resources import ENDPOINT, MODEL, QUOTA, SINGLE, STORED_MODEL, TOKEN


@pytest.mark.parametrize(
    ("changes", "type_", "reason", "field"),
    [
        ({"runtime": "tensorrt"}, "Precheck", "RuntimeNotSupport", "spec.runtime"),
        (
            {"podGroupPolicy": {"kubeScheduling": {}}, "runtime": "vLLM"},
            "Precheck",
            "RuntimeNotSupport",
            "spec.runtime",
        ),
        ({"size": 2, "tensorParallelSize": 3}, "Precheck", "ParallelismDoesNotFillGroup", "spec."),
        ({"runtimeCommonArgs": ["--no-such-flag"]}, "Precheck", "UnknownEngineOption", "spec.runtimeCommonArgs"),
        ({"model": {"name": "unknown"}}, "Loaded", "ModelNotExist", "spec.model.name"),
    ],
    ids=["runtime", "runtime-in-capitals", "parallelism", "option", "model"],
)
async def test_an_application_names_the_field(room, running, changes, type_, reason, field):
    room.apply(STORED_MODEL)
    room.apply(SINGLE, **changes)
    await room.condition("ArksApplication", "app-qwen", type_, "False", reason)
    ready = await room.condition("ArksApplication", "app-qwen", "Ready", "False", reason)
    assert field in ready["message"]
    await room.event("app-qwen", "Warning", reason)


async def test_what_only_the_api_server_can_refuse_is_a_condition_without_the_value(room, running, actor):
    deployed = SINGLE.replace("{name: app-qwen}", "{name: app-qwen, annotations: {arks.ai/workload: deployment}}")
    room.apply(STORED_MODEL, MODEL.replace("name: qwen-7b", "name: other"))
    secret = "not-a-real-secret-value"
    env = [{"name": "A", "value": secret, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    room.apply(deployed, instanceSpec={"env": env})
    found = await room.condition("ArksApplication", "app-qwen", "Ready", "False", "UnderlayReconcileFailed")
    assert "Deployment app-qwen" in found["message"]
    assert "env" in found["message"]
    assert secret not in found["message"]
    # Beside it everything goes on, and it heals itself.
    await room.phase("ArksModel", "other", "Ready")
    room.patch("ArksApplication", "app-qwen", {"spec": {"instanceSpec": {"env": []}}})
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_a_claim_that_is_refused_is_said_and_heals(room, running, actor):
    room.apply(MODEL, storage={"pvc": {"spec": {"accessModes": ["Sometimes"]}}})
    found = await room.condition("ArksModel", "qwen-7b", "StorageCreated", "False", "BoundFailed")
    assert "spec.storage.pvc" in found["message"]
    await room.event("qwen-7b", "Warning", "BoundFailed")
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": {"accessModes": ["ReadWriteOnce"]}}}}})
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_an_endpoint_with_too_many_headers_and_one_with_weight_0(room, running, actor, gateway):
    headers = [{"name": f"x-{index}", "value": "y"} for index in range(15)]
    room.apply(ENDPOINT, matchConfigs=[{"headers": headers}])
    found = await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "False", "TooManyHeaders")
    assert "spec.matchConfigs[0].headers" in found["message"]
    room.apply(STORED_MODEL, SINGLE)
    room.apply(ENDPOINT.replace("name: qwen-7b}", "name: idle}"), defaultWeight=0, modelName="qwen-7b")
    await room.condition("ArksEndpoint", "idle", "Programmed", "False", "NoBackends")


async def test_what_our_types_refuse_is_a_condition_and_breaks_no_other(room, running, gateway):
    """An object stored before a rule existed: the API server keeps it, our types do not take it."""
    room.apply(TOKEN.replace("example-token", "good"), ENDPOINT, QUOTA)
    bad = {"apiVersion": "arks.ai/v1", "kind": "ArksToken", "metadata": {"name": "bad", "namespace": room.namespace}}
    crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/arkstokens.arks.ai"
    live = room.api.request("GET", crd)
    spec = live["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rules = spec.pop("x-kubernetes-validations")
    room.api.request("PUT", crd, live)
    try:

        def stored():
            try:
                return room.api.apply({**bad, "spec": {"qos": []}})
            except KubeError:
                return None

        await wait_for(stored)
        found = await room.condition("ArksToken", "bad", "Accepted", "False", "InvalidSpec")
        assert "tokenSecretRef" in found["message"]
        await room.condition("ArksToken", "good", "Accepted", "True")
        await room.event("bad", "Warning", "InvalidSpec")
        room.patch("ArksToken", "bad", {"spec": {"token": "sk-now-it-has-one"}})
        await room.condition("ArksToken", "bad", "Accepted", "True")
    finally:
        # While the kind is set up anew, deletions may be lost; so they come first.
        for token in room.list("ArksToken"):
            room.delete("ArksToken", token["metadata"]["name"])
        live = room.api.request("GET", crd)
        spec = live["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        spec["x-kubernetes-validations"] = rules
        room.api.request("PUT", crd, live)


async def test_two_endpoints_for_one_model_name(room, running, gateway):
    room.apply(ENDPOINT, ENDPOINT.replace("name: qwen-7b}", "name: zweite}"), modelName="qwen-7b")
    found = await room.condition("ArksEndpoint", "zweite", "Degraded", "True", "ModelNameTaken")
    assert "spec.modelName" in found["message"]
    room.delete("ArksEndpoint", "qwen-7b")
    await room.until(
        "ArksEndpoint",
        "zweite",
        lambda item: all(each["type"] != "Degraded" for each in item["status"]["conditions"]),
    )
