"""A download that failed says why: the loader's own reason, the field, and what would help; and nobody else is hurt."""

from __future__ import annotations

import pytest

from controller.reconcile.loading import State, loading_of
from tests.models.hubs import TOKEN, Hub
from tests.models.pods import LoaderPods
from tests.models.stores import KEY_ID, SECRET, Store, Stored
from tests.reconcile.conftest import condition
from tests.reconcile.resources import MODEL, STORED_MODEL

OTHER = STORED_MODEL.replace("name: qwen-7b", "name: other")


@pytest.fixture
async def hub():
    server = await Hub().start()
    server.push({"config.json": b"{}"})
    yield server
    await server.stop()


@pytest.fixture
async def loaders(room, tmp_path):
    async with LoaderPods(room.api, room.namespace, tmp_path) as found:
        yield found


def secret(room, name, **data):
    meta = {"name": name, "namespace": room.namespace}
    room.api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": data})


def source(hub, **more):
    return {"huggingface": {"endpoint": hub.api.url, **more}}


async def failed(room, reason):
    """The condition's message, once the model has failed for that; an unconcerned model beside it is ready."""
    found = await room.condition("ArksModel", "qwen-7b", "ModelLoaded", "False", reason)
    model = await room.phase("ArksModel", "qwen-7b", "Failed")
    assert condition(model, "Ready")["reason"] == reason
    await room.event("qwen-7b", "Warning", reason)
    await room.phase("ArksModel", "other", "Ready")
    return found["message"]


async def test_a_revision_that_is_not_there(room, running, hub, loaders):
    room.apply(OTHER)
    room.apply(MODEL, model="org/model", source=source(hub, revision="v9"))
    message = await failed(room, "NotFound")
    assert message == "spec.source.huggingface.revision: 127.0.0.1: org/model has no such revision"


async def test_no_room_says_how_much_is_needed_and_how_much_is_free(room, running, hub, loaders):
    loaders.environment["ARKS_LOADER_MARGIN_BYTES"] = str(1 << 60)  # more than any disk has
    room.apply(OTHER)
    room.apply(MODEL, model="org/model", source=source(hub))
    message = await failed(room, "NoSpace")
    assert message.startswith("spec.storage: 1073741824.0 GiB are needed and ")
    assert "are free on the volume; enlarge the storage" in message


async def test_a_token_that_is_refused_is_named_and_not_shown(room, running, hub, loaders):
    hub.token, hub.gated = TOKEN, True
    secret(room, "hf", HF_TOKEN="hf_wrong-token")
    room.apply(OTHER)
    room.apply(MODEL, model="org/model", source=source(hub, tokenSecretRef={"name": "hf"}))
    message = await failed(room, "AccessDenied")
    assert message.startswith("spec.source.huggingface.tokenSecretRef: ")
    assert "hf_wrong-token" not in str(room.get("ArksModel", "qwen-7b"))
    assert "hf_wrong-token" not in str(room.api.list("v1", "Event", room.namespace))
    secret(room, "hf", HF_TOKEN=TOKEN)
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_a_secret_without_the_key_is_said_before_a_pod_waits_for_it(room, running, hub, loaders):
    secret(room, "hf", TOKEN="hf_x")
    room.apply(OTHER)
    room.apply(MODEL, model="org/model", source=source(hub, tokenSecretRef={"name": "hf"}))
    message = await failed(room, "SecretKeyNotFound")
    assert message == "spec.source.huggingface.tokenSecretRef.name: the Secret hf has no key HF_TOKEN"
    assert room.find("Job", "arks-worker-qwen-7b") is None
    secret(room, "hf", HF_TOKEN="hf_x")
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_temporary_credentials_of_a_store_are_used_with_their_session(room, running, loaders):
    store = await Store(keys={KEY_ID: (SECRET, "the-session")}).start()
    store.objects = {"qwen/config.json": Stored(b"{}")}
    try:
        secret(room, "store", AWS_ACCESS_KEY_ID=KEY_ID, AWS_SECRET_ACCESS_KEY=SECRET)
        keys = {"credentialsSecretRef": {"name": "store"}, "pathStyle": True}
        s3 = {"bucket": "weights", "prefix": "qwen", "endpoint": store.origin.url, **keys}
        room.apply(OTHER)
        room.apply(MODEL, source={"huggingface": None, "s3": s3})
        message = await failed(room, "AccessDenied")
        assert message.startswith("spec.source.s3.credentialsSecretRef: ")
        secret(room, "store", AWS_ACCESS_KEY_ID=KEY_ID, AWS_SECRET_ACCESS_KEY=SECRET, AWS_SESSION_TOKEN="the-session")
        await room.phase("ArksModel", "qwen-7b", "Ready")
    finally:
        await store.stop()
    assert [one.environment.get("AWS_SESSION_TOKEN") for one in loaders.started] == [None, "the-session"]


async def test_a_source_that_is_away_for_a_while_is_waited_for_in_words(room, running, hub, loaders):
    hub.api.forever = True
    hub.api.faults["api"] = [("status", 503)]
    loaders.environment["ARKS_LOADER_RETRIES"] = "0"
    room.apply(MODEL, model="org/model", source=source(hub))
    model = await room.until(
        "ArksModel",
        "qwen-7b",
        lambda item: "trying again after" in (condition(item, "ModelLoaded") or {}).get("message", ""),
    )
    assert model["status"]["phase"] == "ModelLoading"
    assert "127.0.0.1 answers 503" in condition(model, "ModelLoaded")["message"]
    hub.api.faults.clear()
    tried = len(loaders.started)
    # Kubernetes lets some seconds pass before the next pod, and more with each.
    await room.phase("ArksModel", "qwen-7b", "Ready")
    assert len(loaders.started) in {tried, tried + 1}
    assert len(loaders.started) > 1


# -- what a Job and its pods say, without a cluster -------------------------------------------------------------------


def job(type_="", **more):
    conditions = [{"type": type_, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", **more}]
    return {"metadata": {"uid": "job"}, "status": {"conditions": conditions if type_ else []}}


def pod(phase="Failed", scheduled=None, **state):
    conditions = [scheduled] if scheduled else []
    containers = [{"name": "worker", "state": state}] if state else []
    status = {"phase": phase, "conditions": conditions, "containerStatuses": containers}
    return {"metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"}, "status": status}


def ended(code, message="", reason="Error"):
    return {"terminated": {"exitCode": code, "message": message, "reason": reason}}


def test_a_reason_that_no_condition_can_hold_is_not_taken_over():
    said = '{"state":"failed","reason":"no reason at all!","field":"spec.model","message":"m"}'
    found = loading_of(job("Failed"), [pod(**ended(3, said))])
    assert (found.reason, found.message) == ("ModelLoadFailed", "spec.model: m")


def test_a_loader_that_took_too_much_memory_is_told_as_such():
    halfway = '{"state":"loading","bytesDone":5,"filesDone":0,"filesTotal":1}'
    found = loading_of(job("Failed"), [pod(**ended(137, halfway, "OOMKilled"))])
    assert (found.reason, found.message.partition(":")[0]) == ("ModelLoadFailed", "spec.instanceSpec.resources")
    found = loading_of(job("Failed"), [pod(**ended(137, halfway))])
    assert found.message == "the loader ended with status 137"


def test_words_of_another_loader_and_of_the_job_are_better_than_none():
    assert loading_of(job("Failed"), [pod(**ended(1, "wget: no route"))]).message == "wget: no route"
    assert loading_of(job("Failed", message="deadline"), []).message == "deadline"


def test_a_pod_that_no_node_takes_says_so():
    reason = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: unbound claim",
    }
    found = loading_of(job(), [pod("Pending", reason)])
    assert (found.state, found.message) == (State.LOADING, "Unschedulable: 0/3 nodes: unbound claim")
