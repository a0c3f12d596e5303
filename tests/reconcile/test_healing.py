"""A state called Failed lasts as long as its cause: the Secret, the Gateway, the claim, the API that appear later."""

from __future__ import annotations

import asyncio
import datetime as dt

from controller.kube.resource import Key
from tests.harness.actor import Actor
from tests.harness.kubernetes import KubeApi
from tests.reconcile.conftest import CRDS, STAND_INS, Room, Running, condition, gateway_kinds, wait_for
from tests.reconcile.resources import ENDPOINT, GATEWAY, MODEL, PAIR, SINGLE, STORED_MODEL, TOKEN

SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hf"}, "stringData": {"HF_TOKEN": "hf_x"}}


def in_s(seconds):
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def secret(room, name, **data):
    room.api.apply({**SECRET, "metadata": {"name": name, "namespace": room.namespace}, "stringData": data})


async def test_a_download_waits_for_its_secret(room, running, actor):
    room.apply(MODEL, source={"huggingface": {"tokenSecretRef": {"name": "hf"}}})
    found = await room.condition("ArksModel", "qwen-7b", "ModelLoaded", "False", "SecretNotFound")
    assert "spec.source.huggingface.tokenSecretRef.name" in found["message"]
    assert room.find("Job", "arks-worker-qwen-7b") is None
    secret(room, "hf", HF_TOKEN="hf_x")
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_a_refused_download_is_tried_again_when_its_secret_changes(room, running, actor):
    secret(room, "hf", HF_TOKEN="wrong")
    actor.loader = "fail"
    room.apply(MODEL, source={"huggingface": {"tokenSecretRef": {"name": "hf"}}})
    await room.phase("ArksModel", "qwen-7b", "Failed")
    await running.quiet()
    actor.loader = "succeed"
    secret(room, "hf", HF_TOKEN="right")
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_a_failed_download_is_tried_again_after_a_while(room, actor):
    running = Running(room.api, room.namespace, model_retry_s=0.0)
    await running.start()
    try:
        actor.loader = "fail"
        room.apply(MODEL)
        job = await room.until("Job", "arks-worker-qwen-7b", lambda item: item["metadata"]["uid"])
        await room.until(
            "Job", "arks-worker-qwen-7b", lambda item: item["metadata"]["uid"] != job["metadata"]["uid"], "a new one"
        )
        actor.loader = "succeed"
        await room.phase("ArksModel", "qwen-7b", "Ready")
    finally:
        await running.stop()


async def test_a_model_in_a_claim_that_comes_later(room, running):
    room.apply(STORED_MODEL, storage=None, source={"pvc": {"claimName": "weights"}})
    found = await room.condition("ArksModel", "qwen-7b", "StorageCreated", "False", "ClaimNotFound")
    assert "spec.source.pvc.claimName" in found["message"]
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    room.apply(claim)
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_an_endpoint_waits_for_its_gateway(room, running, actor):
    room.apply(STORED_MODEL, SINGLE, ENDPOINT)
    found = await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "False", "NoGateway")
    assert "spec.gatewayRef.name" in found["message"]
    await room.event("qwen-7b", "Warning", "NoGateway")
    room.apply(GATEWAY)
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")


async def test_a_token_waits_for_its_endpoint_quota_and_secret(room, running, gateway):
    sealed = TOKEN.replace("token: sk-test123456", "tokenSecretRef: {name: sealed, key: token}")
    room.apply(sealed)
    found = await room.condition("ArksToken", "example-token", "Accepted", "False", "SecretNotFound")
    assert "spec.tokenSecretRef.name" in found["message"]
    secret(room, "sealed", other="x")
    await room.condition("ArksToken", "example-token", "Accepted", "False", "SecretKeyNotFound")
    secret(room, "sealed", token="sk-in-a-secret")
    found = await room.condition("ArksToken", "example-token", "Accepted", "False", "EndpointNotFound")
    assert found["message"].startswith("spec.qos[0].arksEndpoint.name")
    room.apply(ENDPOINT)
    found = await room.condition("ArksToken", "example-token", "Accepted", "False", "QuotaNotFound")
    assert found["message"].startswith("spec.qos[0].quota.name")
    room.apply(
        {"apiVersion": "arks.ai/v1", "kind": "ArksQuota", "metadata": {"name": "basic-quota"}},
        quotas=[{"type": "total", "value": 1}],
    )
    await room.condition("ArksToken", "example-token", "Accepted", "True")
    room.delete("ArksQuota", "basic-quota")
    await room.condition("ArksToken", "example-token", "Accepted", "False", "QuotaNotFound")


async def test_a_quota_of_another_namespace_is_none(room, running, gateway):
    quota = {"apiVersion": "arks.ai/v1", "kind": "ArksQuota", "metadata": {"name": "basic-quota"}}
    other = Room(room.api, room.api.create_namespace())
    try:
        room.apply(ENDPOINT, TOKEN)
        other.apply(quota, quotas=[{"type": "total", "value": 1}])
        found = await room.until(
            "ArksToken",
            "example-token",
            lambda token: (c := condition(token, "Accepted")) and "another namespace" in c["message"],
        )
        assert condition(found, "Accepted")["reason"] == "QuotaNotFound"
    finally:
        room.api.remove_namespace(other.namespace)


async def test_an_expired_token_says_so_when_its_time_has_come(room, running, gateway):
    token = {"apiVersion": "arks.ai/v1", "kind": "ArksToken", "metadata": {"name": "brief"}}
    room.apply(token, token="sk-brief", qos=[], expiresAt=in_s(3600))
    await room.condition("ArksToken", "brief", "Accepted", "True")
    soon = in_s(2)
    room.patch("ArksToken", "brief", {"spec": {"expiresAt": soon}})
    found = await room.condition("ArksToken", "brief", "Accepted", "False", "Expired")
    assert found["lastTransitionTime"] >= soon


async def test_the_weights_are_loaded_again_into_a_claim_that_was_made_anew(room, running, actor):
    room.apply(MODEL)
    await room.phase("ArksModel", "qwen-7b", "Ready")
    job = room.get("Job", "arks-worker-qwen-7b")["metadata"]["uid"]
    actor.loader = "hold"
    room.delete("PersistentVolumeClaim", "qwen-7b")
    await room.phase("ArksModel", "qwen-7b", "ModelLoading")
    await room.until("Job", "arks-worker-qwen-7b", lambda item: item["metadata"]["uid"] != job)
    actor.loader = "succeed"
    await actor.again()
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_a_download_whose_end_is_heard_late_does_not_speak_for_the_claim_that_was_made_anew(room, running, actor):
    room.apply(MODEL)
    await room.phase("ArksModel", "qwen-7b", "Ready")
    await running.quiet()
    job, claim = (
        room.get(kind, name)["metadata"]["uid"]
        for kind, name in (("Job", "arks-worker-qwen-7b"), ("PersistentVolumeClaim", "qwen-7b"))
    )
    actor.loader = "hold"
    jobs, late = running.controller.watches.reflectors["Job"], []
    hear, jobs._event = jobs._event, lambda line, seen: late.append(line) or seen
    room.delete("PersistentVolumeClaim", "qwen-7b")
    await room.until("PersistentVolumeClaim", "qwen-7b", lambda item: item["metadata"]["uid"] != claim)
    await room.phase("ArksModel", "qwen-7b", "ModelLoading")
    await wait_for(lambda: late)
    jobs._event = hear
    for line in late:
        hear(line, None)
    await room.until("Job", "arks-worker-qwen-7b", lambda item: item["metadata"]["uid"] != job)
    actor.loader = "succeed"
    await actor.again()
    await room.phase("ArksModel", "qwen-7b", "Ready")


async def test_a_finished_download_that_was_cleaned_away_is_not_repeated(room, running, actor):
    room.apply(MODEL)
    await room.phase("ArksModel", "qwen-7b", "Ready")
    actor.loader = "hold"
    room.delete("Job", "arks-worker-qwen-7b")
    await room.gone("Job", "arks-worker-qwen-7b")
    await running.quiet()
    assert room.find("Job", "arks-worker-qwen-7b") is None
    assert room.get("ArksModel", "qwen-7b")["status"]["phase"] == "Ready"


async def test_apis_that_are_installed_later_are_found(own_kube_api):
    """A bare cluster: one pod runs as a Deployment, a pair waits, a route waits; then everything is installed."""
    api = own_kube_api
    await asyncio.to_thread(api.apply, CRDS)
    room = Room(api, api.create_namespace())
    running = Running(api, room.namespace)
    await running.start()
    try:
        room.apply(STORED_MODEL, ENDPOINT)
        room.apply(SINGLE, size=2, tensorParallelSize=2)
        failed = await room.phase("ArksApplication", "app-qwen", "Failed")
        assert condition(failed, "Precheck")["reason"] == "WorkloadApiMissing"
        await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "False", "GatewayApiMissing")
        room.apply(SINGLE.replace("app-qwen", "alone"), servedModelName="alone")
        await room.until("Deployment", "alone", lambda item: item["spec"]["replicas"] == 1)
        await room.condition("ArksApplication", "alone", "Degraded", "True", "WorkloadApiMissing")
        # RoleBasedGroup first: whichever is found first runs the application, and goes on running it.
        stand_ins = sorted(STAND_INS.glob("*.yaml"), reverse=True)
        await asyncio.to_thread(api.apply, *stand_ins, *gateway_kinds())
        room.apply(GATEWAY)
        async with Actor(api, room.namespace):
            await room.phase("ArksApplication", "app-qwen", "Running")
            await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
            # What runs as a Deployment stays one.
            alone = await room.until("ArksApplication", "alone", lambda app: not condition(app, "Degraded"))
            assert alone["status"]["driver"] == "deployment"
        watches = running.controller.watches
        assert watches.owned("RoleBasedGroup", Key(room.namespace, "app-qwen-0")) is not None
        # And away again: nothing hangs, the loops go on for the rest.
        names = ("rolebasedgroups", "rolebasedgroupsets")
        for name in names:
            path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}.workloads.x-k8s.io"
            await asyncio.to_thread(api.request, "DELETE", path)
        room.apply(SINGLE.replace("app-qwen", "later"), servedModelName="later")
        await room.until("LeaderWorkerSet", "later", lambda item: item["spec"]["replicas"] == 1)
    finally:
        await running.stop()


async def test_a_pair_needs_no_group_api(room, running, actor):
    actor.serving = lambda _pod: False
    room.apply(STORED_MODEL)
    room.apply(PAIR.replace("{name: pd}", "{name: pd, annotations: {arks.ai/workload: lws}}"))
    await room.phase("ArksDisaggregatedApplication", "pd", "Creating")
    actor.serving = lambda _pod: True
    await actor.again()
    assert sorted(item["metadata"]["name"] for item in room.list("LeaderWorkerSet")) == ["pd-decode", "pd-prefill"]
    # The router's Deployment is made by the real controllers of Kubernetes.
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
    assert room.get("ArksDisaggregatedApplication", "pd")["status"]["router"]["readyReplicas"] == 1


async def test_our_own_kinds_are_missed_by_name_until_they_are_installed(own_kube_api: KubeApi):
    running = Running(own_kube_api, own_kube_api.create_namespace())
    await running.start()
    try:
        said = running.controller.unready
        await wait_for(lambda: any("the kind ArksToken is not installed: arks crds | kubectl" in why for why in said()))
        await asyncio.to_thread(own_kube_api.apply, CRDS)
        await wait_for(lambda: not said(), 120.0)
    finally:
        await running.stop()
