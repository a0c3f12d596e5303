"""Names of every length, lists that say a thing twice, pods that do not start: what Kubernetes takes, is served; what
it does not, is said at the field that must change."""

from __future__ import annotations

import pytest

from tests.reconcile.conftest import condition
from tests.reconcile.resources import ENDPOINT, MODEL, SINGLE, STORED_MODEL

ON_A_DEPLOYMENT = "annotations: {arks.ai/workload: deployment}"


def named(source, name, more=""):
    return source.replace(
        "name: app-qwen}" if "app-qwen}" in source else "name: qwen-7b}", f"name: {name}{', ' * bool(more)}{more}}}", 1
    )


async def test_an_endpoint_may_be_named_as_long_as_its_model(room, running, gateway):
    name = "org.model-" + "v" * 90
    room.apply(named(ENDPOINT, name))
    await room.condition("ArksEndpoint", name, "Accepted", "True")
    (match, *_) = room.get("HTTPRoute", name)["spec"]["rules"][0]["matches"]
    assert {"type": "Exact", "name": "model", "value": name} in match["headers"]


@pytest.mark.parametrize("length", [52, 63])
async def test_a_model_whose_downloads_name_would_be_too_long_is_loaded(room, running, actor, length):
    room.apply(named(MODEL, "m" * length))
    await room.phase("ArksModel", "m" * length, "Ready")


async def test_names_that_do_not_fit_are_refused_at_the_name(room, running, actor):
    long = "m" * 64
    room.apply(STORED_MODEL, named(MODEL, long))
    found = await room.condition("ArksModel", long, "StorageCreated", "False", "InvalidName")
    assert found["message"].startswith("metadata.name: the name has 64 characters")
    room.apply(SINGLE, model={"name": long})
    found = await room.condition("ArksApplication", "app-qwen", "Loaded", "False", "ModelLoadFailed")
    assert "metadata.name: the name has 64 characters" in found["message"]
    for name in ("a" * 47, "qwen2.5"):
        room.apply(named(SINGLE, name, ON_A_DEPLOYMENT))
        found = await room.condition("ArksApplication", name, "Precheck", "False", "InvalidName")
        assert found["message"].startswith("metadata.name: the name ")


async def test_of_a_variable_that_is_given_twice_the_last_counts(room, running, actor):
    twice = [{"name": "LEVEL", "value": "first"}, {"name": "OTHER", "value": "x"}, {"name": "LEVEL", "value": "last"}]
    room.apply(STORED_MODEL)
    app = named(SINGLE, "app-qwen", ON_A_DEPLOYMENT)
    secrets = [{"name": "registry"}, {"name": "registry"}]
    room.apply(app, instanceSpec={"env": twice}, runtimeImagePullSecrets=secrets)
    await room.phase("ArksApplication", "app-qwen", "Running")
    pod = room.get("Deployment", "app-qwen")["spec"]["template"]["spec"]
    env = pod["containers"][0]["env"]
    assert [each["value"] for each in env if each["name"] == "LEVEL"] == ["last"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


async def test_a_list_that_cannot_be_applied_is_a_condition(room, running, actor):
    """The API server calls it an internal error, and it is none that passes."""
    alias = {"ip": "10.0.0.1", "hostnames": ["a"]}
    room.apply(STORED_MODEL)
    room.apply(named(SINGLE, "app-qwen", ON_A_DEPLOYMENT), instanceSpec={"hostAliases": [alias, alias]})
    found = await room.condition("ArksApplication", "app-qwen", "Ready", "False", "UnderlayReconcileFailed")
    assert "hostAliases" in found["message"]
    room.patch("ArksApplication", "app-qwen", {"spec": {"instanceSpec": {"hostAliases": [alias]}}})
    await room.phase("ArksApplication", "app-qwen", "Running")


async def test_an_application_says_what_holds_its_pods_up(room, running, actor):
    actor.serving = lambda _pod: False
    room.apply(STORED_MODEL, SINGLE)
    pod = await room.until("Pod", "app-qwen-0-inference-0", lambda item: item["status"].get("containerStatuses"))
    path = f"{room.api.path('v1', 'Pod', room.namespace)}/{pod['metadata']['name']}/status"
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "vllm/none"'}
    states = [{**pod["status"]["containerStatuses"][0], "state": {"waiting": waiting}}]
    said = {"status": {"containerStatuses": states}}
    room.api.request("PATCH", path, said, content_type="application/strategic-merge-patch+json")
    found = await room.until(
        "ArksApplication", "app-qwen", lambda app: "ImagePullBackOff" in condition(app, "Ready")["message"]
    )
    told = condition(found, "Ready")
    assert told["reason"] == "ReplicasNotReady"
    assert f"pod {pod['metadata']['name']}: ImagePullBackOff: Back-off pulling" in told["message"]
