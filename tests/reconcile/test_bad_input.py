"""What the schema admits and the world does not: a condition that names the field, an Event, and nobody else hurt."""

from __future__ import annotations

import contextlib
import copy

import pytest

from tests.harness.kubernetes import KubeError
from tests.reconcile.conftest import Room, condition, wait_for
from tests.reconcile.resources import ENDPOINT, MODEL, QUOTA, SINGLE, STORED_MODEL, TOKEN

GOOD = (MODEL, SINGLE, ENDPOINT, QUOTA, TOKEN)
# Bad objects, all named "bad": the document, what is wrong with it, where that is said, and which field is named.
BAD = {
    "unknown-model": (
        SINGLE.replace("app-qwen", "bad"),
        {"model": {"name": "unknown"}},
        ("ArksApplication", "Ready", "ModelNotExist", "spec.model.name: "),
    ),
    "unsupported-runtime": (
        SINGLE.replace("app-qwen", "bad"),
        {"runtime": "tensorrt"},
        ("ArksApplication", "Precheck", "RuntimeNotSupport", "spec.runtime: "),
    ),
    # The API server refuses the plain spellings (`tests/apis/cel`); this one means the same.
    "reserved-mount": (
        SINGLE.replace("app-qwen", "bad"),
        {"instanceSpec": {"volumeMounts": [{"name": "v", "mountPath": "//models/."}]}},
        ("ArksApplication", "Precheck", "ReservedVolumeMountPath", "spec.instanceSpec.volumeMounts: "),
    ),
    "default-weight-0": (
        ENDPOINT.replace("name: qwen-7b}", "name: bad}"),
        {"modelName": "qwen-7b", "defaultWeight": 0},
        ("ArksEndpoint", "Programmed", "NoBackends", "spec.defaultWeight: "),
    ),
    "all-weights-0": (
        ENDPOINT.replace("name: qwen-7b}", "name: bad}"),
        {"defaultWeight": 0, "routeConfigs": [{"name": "mine", "port": 80, "weight": 0}]},
        ("ArksEndpoint", "Programmed", "NoBackends", "spec.routeConfigs: "),
    ),
    "no-gateway": (
        ENDPOINT.replace("name: qwen-7b}", "name: bad}"),
        {"gatewayRef": {"name": "nowhere"}},
        ("ArksEndpoint", "Programmed", "NoGateway", "spec.gatewayRef.name: "),
    ),
    "missing-secret-of-a-model": (
        MODEL.replace("name: qwen-7b}", "name: bad}"),
        {"source": {"huggingface": {"tokenSecretRef": {"name": "nowhere"}}}},
        ("ArksModel", "ModelLoaded", "SecretNotFound", "spec.source.huggingface.tokenSecretRef.name: "),
    ),
    "missing-secret-of-a-token": (
        TOKEN.replace("example-token", "bad"),
        {"token": None, "tokenSecretRef": {"name": "nowhere", "key": "token"}},
        ("ArksToken", "Accepted", "SecretNotFound", "spec.tokenSecretRef.name: "),
    ),
    "quota-of-another-namespace": (
        TOKEN.replace("example-token", "bad"),
        {"token": "sk-of-the-bad-one", "qos": [{"arksEndpoint": {"name": "qwen-7b"}, "quota": {"name": "elsewhere"}}]},
        ("ArksToken", "Accepted", "QuotaNotFound", "spec.qos[0].quota.name: "),
    ),
}


@pytest.fixture
def elsewhere(room):
    """Another namespace, with the quota that nobody here may use."""
    other = Room(room.api, room.api.create_namespace())
    other.apply(QUOTA.replace("basic-quota", "elsewhere"))
    yield other
    room.api.remove_namespace(other.namespace)


async def all_good(room):
    await room.phase("ArksModel", "qwen-7b", "Ready")
    await room.phase("ArksApplication", "app-qwen", "Running")
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    await room.condition("ArksQuota", "basic-quota", "Accepted", "True")
    await room.condition("ArksToken", "example-token", "Accepted", "True")


@pytest.mark.parametrize(("document", "wrong", "told"), BAD.values(), ids=BAD)
async def test_what_the_world_lacks_is_said_with_its_field_and_hurts_nobody(
    room, running, actor, gateway, elsewhere, document, wrong, told
):
    kind, type_, reason, field = told
    room.apply(document, **wrong)
    room.apply(*GOOD)
    await all_good(room)

    def found(item):
        one = condition(item, type_)
        return one and (one["status"], one["reason"]) == ("False", reason) and one["message"].startswith(field)

    await room.until(kind, "bad", found, f"{type_}=False {reason}, {field}")

    def warned():
        events = [each for each in room.list("Event") if each["involvedObject"]["name"] == "bad"]
        return [each for each in events if (each["type"], each["reason"]) == ("Warning", reason)]

    events = await wait_for(warned)
    assert {each["involvedObject"]["kind"] for each in events} == {kind}
    await running.quiet()
    await all_good(room)
    # And it does not keep the loop busy.
    bad = room.get(kind, "bad")
    assert found(bad)
    await running.quiet()
    assert room.get(kind, "bad")["metadata"]["resourceVersion"] == bad["metadata"]["resourceVersion"]


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


async def test_an_endpoint_with_too_many_headers(room, running, actor, gateway):
    headers = [{"name": f"x-{index}", "value": "y"} for index in range(15)]
    room.apply(ENDPOINT, matchConfigs=[{"headers": headers}])
    found = await room.condition("ArksEndpoint", "qwen-7b", "Accepted", "False", "TooManyHeaders")
    assert "spec.matchConfigs[0].headers" in found["message"]
    await room.event("qwen-7b", "Warning", "TooManyHeaders")


@contextlib.asynccontextmanager
async def before_its_rules(room, kind):
    """Objects of this kind may be stored that our rules refuse, as they were before the rules existed."""
    crd = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind.lower()}s.arks.ai"
    live = room.api.request("GET", crd)
    schema = live["spec"]["versions"][0]["schema"]
    bare = copy.deepcopy(live)
    bare["spec"]["versions"][0]["schema"] = without_rules(schema)
    room.api.request("PUT", crd, bare)
    try:
        yield
    finally:
        # While the kind is set up anew, deletions may be lost; so they come first.
        for item in room.list(kind):
            room.delete(kind, item["metadata"]["name"])
        live = room.api.request("GET", crd)
        live["spec"]["versions"][0]["schema"] = schema
        room.api.request("PUT", crd, live)


def without_rules(tree):
    if isinstance(tree, dict):
        return {key: without_rules(value) for key, value in tree.items() if key != "x-kubernetes-validations"}
    return [without_rules(each) for each in tree] if isinstance(tree, list) else tree


async def stored(room, document, **changes):
    """Once the kind is set up without its rules."""

    def tried():
        try:
            return room.apply(document, **changes)
        except KubeError:
            return None

    await wait_for(tried)


async def test_what_our_types_refuse_is_a_condition_and_breaks_no_other(room, running, gateway):
    """The API server keeps it, our types do not take it."""
    room.apply(TOKEN.replace("example-token", "good"), ENDPOINT, QUOTA)
    async with before_its_rules(room, "ArksToken"):
        await stored(room, TOKEN.replace("example-token", "bad"), token=None, qos=[])
        found = await room.condition("ArksToken", "bad", "Accepted", "False", "InvalidSpec")
        assert "tokenSecretRef" in found["message"]
        await room.condition("ArksToken", "good", "Accepted", "True")
        await room.event("bad", "Warning", "InvalidSpec")
        room.patch("ArksToken", "bad", {"spec": {"token": "sk-now-it-has-one"}})
        await room.condition("ArksToken", "bad", "Accepted", "True")


async def test_a_reserved_volume_of_an_application_that_arks_had_admitted(room, running, actor, gateway):
    async with before_its_rules(room, "ArksApplication"):
        volume = {"name": "models", "emptyDir": {}}
        await stored(room, SINGLE.replace("app-qwen", "bad"), instanceSpec={"volumes": [volume]})
        found = await room.condition("ArksApplication", "bad", "Precheck", "False", "InvalidSpec")
        assert found["message"].startswith("spec.instanceSpec: ")
        assert "the volume name models is reserved" in found["message"]
        await room.phase("ArksApplication", "bad", "Failed")
        await room.event("bad", "Warning", "InvalidSpec")
        room.apply(*GOOD)
        await all_good(room)
        room.patch("ArksApplication", "bad", {"spec": {"instanceSpec": {"volumes": None}}})
        await room.condition("ArksApplication", "bad", "Precheck", "True")


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
