"""What is applied, changed and deleted in the cluster while requests flow, and what their clients see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.harness.kubernetes import Object
from tests.manifests.tenant import LEFT, MODEL, RIGHT, Tenant, application, endpoint, route, secret_of, token
from tests.manifests.traffic import Answer, Traffic

SHARE_OF = 100
NEW_MODEL, NEW = "fresh", "newcomer"


@pytest.fixture
async def flow(tenant: Tenant) -> AsyncIterator[Traffic]:
    """Of the model that is there from the beginning. Nothing of it may fail, whatever a test does."""
    async with Traffic(tenant.platform, "rich", MODEL, clients=4) as one:
        await one.until(lambda: len(one.answers) >= SHARE_OF, "answers")
        yield one
    assert one.failed == []


def ok(answer: Answer) -> bool:
    return answer.status == 200


def refused(answer: Answer) -> bool:
    return answer.status == 401


async def until_share(flow: Traffic, app: str, percent: int) -> None:
    """Exact in the order of the decisions; four clients mix up the order of the answers a little."""
    began = len(flow.answers)

    def near() -> bool:
        if len(flow.answers) - began < SHARE_OF:
            return False
        return abs(flow.applications(SHARE_OF)[app] * 100 / SHARE_OF - percent) <= 4

    await flow.until(near, f"{percent} % to {app}, but {flow.applications(SHARE_OF)}")


def weights(route: Object) -> dict[str, int]:
    return {item["name"]: item["weight"] for item in route["spec"]["rules"][0]["backendRefs"]}


# --- weights -------------------------------------------------------------------------------------------------------


async def test_changed_weights_shift_each_engines_share_without_a_failed_request(tenant: Tenant, flow: Traffic):
    room = tenant.room
    await until_share(flow, LEFT, 50)
    try:
        for left, right in ((9, 1), (1, 9), (0, 1)):
            room.apply(endpoint(MODEL, routeConfigs=[route(LEFT, left), route(RIGHT, right)]))
            await until_share(flow, LEFT, 100 * left // (left + right))
            wanted = {f"arks-application-{LEFT}": left, f"arks-application-{RIGHT}": right}
            await room.until("HTTPRoute", MODEL, lambda item, wanted=wanted: weights(item) == wanted)
        await flow.until_last(SHARE_OF, lambda answer: answer.application == RIGHT, "nothing to the weight 0")
    finally:
        room.apply(endpoint(MODEL))
    await until_share(flow, LEFT, 50)


# --- tokens --------------------------------------------------------------------------------------------------------


async def test_a_revoked_token_is_refused_from_then_on_and_no_other_and_its_open_stream_ends_whole(
    tenant: Tenant, flow: Traffic, session: aiohttp.ClientSession
):
    room, platform = tenant.room, tenant.platform
    room.apply(token("deleted", MODEL), token("disabled", MODEL))
    for name in ("deleted", "disabled"):
        await tenant.until_served(MODEL, secret_of(name))
    async with (
        Traffic(platform, "deleted", MODEL) as deleted,
        Traffic(platform, "disabled", MODEL) as disabled,
        stream(session, "deleted", 100) as opened,
    ):
        await deleted.until_last(10, ok, "admitted")
        await disabled.until_last(10, ok, "admitted")
        room.delete("ArksToken", "deleted")
        await deleted.until_last(20, refused, "refused")
        assert {answer.status for answer in disabled.answers} == {200}
        room.patch("ArksToken", "disabled", {"spec": {"disabled": True}})
        await disabled.until_last(20, refused, "refused")
        rest = await opened.text()
    assert rest.endswith("data: [DONE]\n\n")
    for each in (deleted, disabled):
        assert [status for status, _ in each.statuses] == [200, 401], "never back"
    room.delete("ArksToken", "disabled")


# --- endpoints -----------------------------------------------------------------------------------------------------


async def test_a_new_endpoint_with_its_application_goes_from_404_to_200_and_away_again(tenant: Tenant, flow: Traffic):
    room = tenant.room
    room.apply(token("early", NEW_MODEL))
    async with Traffic(tenant.platform, "early", NEW_MODEL) as new:
        await new.until_last(10, lambda answer: answer.status == 404, "known as a token, not as a model")
        new.answers.clear()
        room.apply(application(NEW, NEW_MODEL), endpoint(NEW_MODEL))
        await new.until_last(20, ok, "served")
        room.delete("ArksEndpoint", NEW_MODEL)
        await new.until_last(10, lambda answer: answer.status == 404, "gone")
    # 503 in between: the endpoint is known before an engine of it is ready; extproc and Envoy hear of its coming and
    # going each in its own time. A request whose token was looked up just before the endpoint came may be 403.
    assert sum(answer.status == 403 for answer in new.answers) <= 1
    statuses = [status for status, _ in new.statuses if status not in {403, 503}]
    assert statuses in ([404, 200, 404], [200, 404]), new.statuses
    assert {answer.application for answer in new.answers if ok(answer)} == {NEW}
    for kind, name in (("ArksApplication", NEW), ("ArksToken", "early")):
        room.delete(kind, name)


# --- pods ----------------------------------------------------------------------------------------------------------


async def test_a_replica_more_takes_its_share_and_a_replica_less_takes_no_request_along(
    tenant: Tenant, flow: Traffic, session: aiohttp.ClientSession
):
    room = tenant.room
    (stays,) = tenant.pods(LEFT)
    scale(tenant, LEFT, 2)
    await room.until("ArksApplication", LEFT, lambda item: item["status"]["readyReplicas"] == 2)
    await until_share(flow, LEFT, 67)
    (leaves,) = tenant.pods(LEFT).keys() - {stays}
    assert leaves in {answer.engine for answer in flow.answers}

    # It takes longer than the pod has until SIGTERM, and not as long as it has after that.
    async with stream_of(session, leaves, 300) as opened:
        scale(tenant, LEFT, 1)
        rest = await opened.text()
    assert rest.endswith("data: [DONE]\n\n")
    await room.gone("Pod", leaves)
    await flow.until_last(SHARE_OF, lambda answer: answer.engine != leaves, "left alone")
    await until_share(flow, LEFT, 50)
    assert list(tenant.pods(LEFT)) == [stays]


async def test_an_engine_that_envoy_has_not_heard_of_is_not_taken_for_lost(tenant: Tenant, flow: Traffic):
    """extproc learns of it from the controller, Envoy from Envoy Gateway, which may need its time."""
    platform, room = tenant.platform, tenant.room
    (known,) = tenant.pods(LEFT)
    (extproc,) = platform.room("arks-system").list("Pod")
    with platform.gateway.frozen():
        scale(tenant, LEFT, 2)
        await room.until("ArksApplication", LEFT, lambda item: item["status"]["readyReplicas"] == 2)
        ((new, pod),) = ((name, pod) for name, pod in tenant.pods(LEFT).items() if name != known)
        healthy = f'arks_engine_healthy{{engine="{pod["status"]["podIP"]}:8080"}} 1.0'
        async with asyncio.timeout(90):
            while healthy not in await platform.metrics(extproc, 9110):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.05)
        await flow.until_last(SHARE_OF, lambda answer: answer.engine != new, "answered by those that Envoy knows")
        assert healthy in await platform.metrics(extproc, 9110)
    await until_share(flow, LEFT, 67)
    wrong = [
        row for row in platform.ledger.usage() if row["engine"].startswith(pod["status"]["podIP"]) and row["error"]
    ]
    assert wrong == []
    scale(tenant, LEFT, 1)
    await room.gone("Pod", new)


async def test_an_evicted_pod_takes_no_request_along_and_its_successor_gets_its_share(tenant: Tenant, flow: Traffic):
    ((name, pod),) = tenant.pods(LEFT).items()
    path = tenant.platform.api.path("v1", "Pod", tenant.room.namespace)
    evicted = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    with tenant.platform.engines_load():
        tenant.platform.api.request("POST", f"{path}/{name}/eviction", evicted)
        await flow.until_last(SHARE_OF, lambda answer: answer.application == RIGHT, "only the other application")
        await tenant.room.until("Pod", name, lambda item: item["metadata"]["uid"] != pod["metadata"]["uid"])
    await until_share(flow, LEFT, 50)


# --- extproc -------------------------------------------------------------------------------------------------------


async def test_while_extproc_is_replaced_requests_are_503_and_an_open_stream_ends_whole(
    tenant: Tenant, session: aiohttp.ClientSession
):
    """One process keeps the limits, so there is a gap; it is as long as the pods take, and Envoy adds nothing to it."""
    system = tenant.platform.room("arks-system")
    (before,) = system.list("Pod")
    async with Traffic(tenant.platform, "rich", MODEL) as flow, stream(session, "rich", 75) as opened:
        await flow.until_last(20, ok, "served")
        # kubectl rollout restart
        again = {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}
        system.patch("Deployment", "arks", {"spec": {"template": again}})
        rest = await opened.text()
        await system.gone("Pod", before["metadata"]["name"])
        await flow.until_last(20, ok, "served")
    assert rest.endswith("data: [DONE]\n\n")
    assert [status for status, _ in flow.statuses] == [200, 503, 200]


def scale(tenant: Tenant, app: str, replicas: int) -> None:
    """`kubectl scale`."""
    path = tenant.platform.api.path("arks.ai/v1", "ArksApplication", tenant.room.namespace)
    patch = {"spec": {"replicas": replicas}}
    tenant.platform.api.request("PATCH", f"{path}/{app}/scale", patch, content_type="application/merge-patch+json")


@contextlib.asynccontextmanager
async def stream(session: aiohttp.ClientSession, token: str, tokens: int) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer of which nothing is read yet; its headers are there."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "stream": True}
    headers = {"Authorization": f"Bearer {secret_of(token)}"}
    async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200
        yield answer


@contextlib.asynccontextmanager
async def stream_of(session: aiohttp.ClientSession, engine: str, tokens: int) -> AsyncIterator[aiohttp.ClientResponse]:
    """One that this pod gives."""
    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(90):
            while True:
                opened = await stack.enter_async_context(stream(session, "rich", tokens))
                if json.loads((await opened.content.readline()).removeprefix(b"data: "))["model"] == engine:
                    break
                opened.close()
        yield opened
