"""From `kubectl apply` of our manifests and of Arks' own quickstart to answers through the gateway, in one test."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import yaml

from tests.harness.kubernetes import KubeApi, Object
from tests.manifests.platform import JUDGED, Platform
from tests.manifests.tenant import Tenant
from tests.reconcile.conftest import condition, wait_for
from tests.reconcile.resources import QUICKSTART

DOCUMENTS = list(yaml.safe_load_all(QUICKSTART.replace("GATEWAYS", "arks-operator-system")))
CHAT = {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
TOKEN = {"Authorization": "Bearer sk-test123456"}
WATCHER = {
    "apiVersion": "arks.ai/v1",
    "kind": "ArksToken",
    "metadata": {"name": "watcher"},
    "spec": {"token": "sk-watcher", "qos": [{"arksEndpoint": {"name": "qwen-7b"}}]},
}


def told(item: Object, *types: str) -> list[str]:
    return [found["status"] if (found := condition(item, each)) else "" for each in types]


async def until_refused(session: aiohttp.ClientSession, status: int, code: str) -> None:
    """What Envoy and extproc have heard of so far: the API server says nothing about that."""
    seen = ""
    deadline = time.monotonic() + 90
    while seen != f"{status} {code}":
        assert time.monotonic() < deadline, seen
        try:
            async with session.post("/v1/chat/completions", json=CHAT, headers=TOKEN) as answer:
                seen = f"{answer.status} {(await answer.json(content_type=None))['error']['code']}"
        except (aiohttp.ClientError, ValueError) as error:
            seen = repr(error)
        await asyncio.sleep(0.05)


async def test_from_apply_of_the_manifests_and_arks_quickstart_to_an_answer(
    platform: Platform, product: list[Object], session: aiohttp.ClientSession
):
    api, room, system = platform.api, platform.room("default"), platform.room("arks-system")
    platform.actor.loader = "hold"

    # kubectl apply --server-side -k manifests/
    await asyncio.to_thread(platform.install, product)
    await system.until("Deployment", "arks", lambda item: item["status"].get("readyReplicas") == 1)
    await asyncio.to_thread(platform.gateway.settle, JUDGED)
    await until_refused(session, 401, "invalid_token")

    # kubectl create -f examples/quickstart/quickstart.yaml
    await asyncio.to_thread(api.apply, *DOCUMENTS)
    await room.phase("ArksModel", "qwen-7b", "ModelLoading")
    waiting = await room.phase("ArksApplication", "app-qwen", "Loading")
    assert told(waiting, "Precheck", "Loaded", "Ready") == ["True", "False", "False"]
    await room.until("Job", "arks-worker-qwen-7b", lambda item: item["status"].get("active") == 1)
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "False", "NoBackends")
    for kind, name in (("ArksToken", "example-token"), ("ArksQuota", "basic-quota"), ("ArksEndpoint", "qwen-7b")):
        await room.condition(kind, name, "Accepted", "True")

    with platform.engines_load():
        platform.actor.message = '{"state":"ready","model":"Qwen","source":"huggingface","revision":"abc123"}'
        platform.actor.loader = "succeed"
        platform.actor.wake()
        model = await room.phase("ArksModel", "qwen-7b", "Ready")
        assert told(model, "StorageCreated", "ModelLoaded", "Ready") == ["True", "True", "True"]
        await room.until("ArksModel", "qwen-7b", lambda item: item["status"]["revision"] == "abc123")
        creating = await room.phase("ArksApplication", "app-qwen", "Creating")
        assert told(creating, "Precheck", "Loaded", "Ready") == ["True", "True", "False"]
        pods = "app-qwen-0-inference-0", "app-qwen-0-inference-0-1"
        for name in pods:
            await room.until("Pod", name, lambda pod: pod.get("status", {}).get("phase") == "Running")
        # The token is known, its model too; no engine is there yet.
        await until_refused(session, 503, "no_healthy_engine")

    app = await room.phase("ArksApplication", "app-qwen", "Running")
    assert told(app, "Precheck", "Loaded", "Ready") == ["True", "True", "True"]
    assert (app["status"]["readyReplicas"], app["status"]["driver"]) == (1, "rbg")
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    (parent,) = room.get("HTTPRoute", "qwen-7b")["status"]["parents"]
    assert parent["controllerName"] == "gateway.envoyproxy.io/gatewayclass-controller"
    assert {each["status"] for each in parent["conditions"]} == {"True"}
    await wait_for(lambda: behind_services(api) == [pods[0]], what="the leader alone gets traffic")

    # With another token than the quickstart's, whose five requests a minute are for what is to be seen here.
    await asyncio.to_thread(api.apply, WATCHER)
    await Tenant(platform, "default").until_served("qwen-7b", "sk-watcher")
    named = {**TOKEN, "x-request-id": "walk"}
    async with session.post("/v1/chat/completions", json=CHAT, headers=named) as answer:
        assert answer.status == 200, await answer.text()
        body = await answer.json()
    assert body["model"] == pods[0], "the engine in the leader's place answered"
    row = await platform.ledger.row_of("walk")
    assert (row["token"], row["endpoint"], row["accuracy"]) == ("example-token", "qwen-7b", "exact")
    assert row["completion_tokens"] == body["usage"]["completion_tokens"] == 8
    async with session.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=TOKEN) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        events = (await answer.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert len([each for each in events if '"content":' in each]) >= 8
    assert {json.loads(each[6:])["model"] for each in events[:-2]} == {pods[0]}

    # The clock's minute may turn once in between: twelve requests do not fit into two.
    statuses = [await status(session) for _ in range(12)]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= 10

    assert await refusals_of_the_api_server(platform) == []


def behind_services(api: KubeApi) -> list[str]:
    slices = api.list("discovery.k8s.io/v1", "EndpointSlice", "default")
    return [end["targetRef"]["name"] for each in slices for end in each.get("endpoints") or ()]


async def status(session: aiohttp.ClientSession) -> int:
    async with session.post("/v1/chat/completions", json=CHAT, headers=TOKEN) as answer:
        await answer.read()
        return answer.status


async def refusals_of_the_api_server(platform: Platform) -> list[str]:
    """Of what the controller asked for with the rights that the manifests give it."""
    (pod,) = platform.api.list("v1", "Pod", "arks-system")
    lines = (await platform.metrics(pod, 8081)).splitlines()
    calls = [line for line in lines if line.startswith("arks_controller_api_calls")]
    assert calls
    return [line for line in calls if 'outcome="403"' in line or 'outcome="401"' in line]
