"""Dynamo where the cluster has its discovery: frontends and workers in pods of their own, on a real API server.

Proved with it: labels and selector of the Service, the Role (each program has its ServiceAccount's token and no other),
and the environment by which a pod knows itself. Traffic follows readiness, as Kubernetes tells it.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.workloads.model import DYNAMO_METADATA, LWS
from scripts import engines
from tests.engines_real.applications import SERVED, application, disaggregated
from tests.engines_real.client import CHAT, Client, chat
from tests.engines_real.dynamo_cluster import METADATA, DynamoCluster
from tests.engines_real.dynamo_model import prompt_tokens, write_model
from tests.engines_real.pod_container import PodContainer
from tests.harness.gateway import endpoint, policy, running_gateway, sum_series, token, until
from tests.harness.kubernetes import KubeApi

POLICY = policy(endpoint(SERVED), token("alice", "sk-alice", (SERVED,), rates={"rpm": 10**6, "tpm": 10**9}))
WORLD = frozenset({LWS, DYNAMO_METADATA})
GRACE_S = 24
"""of which a quarter passes until the worker is asked whether it is idle"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    engines.make_environment(engines.DYNAMO)
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "chat")
    return folder


@pytest.fixture(scope="module")
def served(kube_cluster) -> Iterator[KubeApi]:
    (definition,) = kube_cluster.apply(METADATA)
    yield kube_cluster
    kube_cluster.delete(definition["apiVersion"], definition["kind"], definition["metadata"]["name"])


@pytest.fixture
def cluster(served, weights, tmp_path) -> Iterator[DynamoCluster]:
    one = DynamoCluster(served, tmp_path / "pods", weights)
    try:
        yield one
    finally:
        one.close()


async def asked(worker: PodContainer, session) -> float:
    """Requests that reached it."""
    async with session.get(f"http://{worker.address}:{worker.port('system')}/metrics") as answer:
        text = await answer.text()
    mine = "\n".join(line for line in text.splitlines() if 'dynamo_endpoint="generate"' in line)
    return sum_series(mine, "dynamo_component_requests_total")


async def test_traffic_follows_readiness_and_a_leaving_worker_loses_nothing(cluster, session, tmp_path):
    instance = {"terminationGracePeriodSeconds": GRACE_S, "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    cluster.apply(application("dynamo", WORLD, cluster.namespace, replicas=2, instanceSpec=instance))
    await cluster.start(4)  # two workers, two frontends
    first, second = cluster.named("dynamo.mocker")
    one, other = cluster.named("dynamo.frontend")
    front = cluster.running[one]
    for name in (first, second):
        assert cluster.running[name].probe("readiness")
    await until(lambda: cluster.announced() == [first, second], 30)
    # They serve, and Kubernetes does not say so yet.
    assert not front.probe("readiness")

    cluster.tell(first, ready=True)
    await until(lambda: front.probe("readiness"), 30)
    cluster.tell(one, ready=True)
    with running_gateway(tmp_path / "gateway", POLICY, [front.url, cluster.running[other].url]) as gateway:
        alice = Client(session, gateway.url, "sk-alice")
        await until(lambda: cluster.running[other].probe("readiness"), 30)
        answer = await alice.ok(CHAT, chat("Hello!", model=SERVED, max_tokens=20, ignore_eos=True))
        row = await gateway.row_of(answer.request_id)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt_tokens("Hello!"), 20)
        assert await asked(cluster.running[second], session) == 0

        body = chat(model=SERVED, max_tokens=1500, ignore_eos=True, stream=True)
        async with alice.stream(CHAT, body) as (request_id, events):
            await anext(events)
            cluster.tell(second, ready=True)
            while not await asked(cluster.running[second], session):
                await alice.ok(CHAT, chat(model=SERVED, max_tokens=1))
            # The first one leaves, with the stream that it alone could have been given.
            leaving = asyncio.create_task(cluster.stop(first))
            answers = [await alice.ask(CHAT, chat(model=SERVED, max_tokens=1)) for _ in range(40)]
            data = [each async for each in events]
        answers += [await alice.ask(CHAT, chat(model=SERVED, max_tokens=1)) for _ in range(10)]
        assert await leaving == 0
        answers += [await alice.ask(CHAT, chat(model=SERVED, max_tokens=1)) for _ in range(10)]
        assert data[-1] == "[DONE]"
        row = await gateway.row_of(request_id)
        assert (row["completion_tokens"], row["error"], row["accuracy"]) == (1500, "", "exact")
        assert [each for each in answers if each.status != 200] == []
        await until(lambda: cluster.announced() == [second], 30)


async def test_prefill_and_decode_find_each_other(cluster, session, tmp_path):
    cluster.apply(disaggregated("dynamo", WORLD, cluster.namespace))
    await cluster.start(3)
    prefill = next(name for name in cluster.running if "prefill" in name)
    decode = next(name for name in cluster.running if "decode" in name)
    (router,) = cluster.named("dynamo.frontend")
    cluster.tell(decode, ready=True)
    cluster.tell(prefill, ready=True)
    await until(lambda: cluster.running[router].probe("readiness"), 30)
    with running_gateway(tmp_path / "gateway", POLICY, [cluster.running[router].url]) as gateway:
        alice = Client(session, gateway.url, "sk-alice")
        text = "Hello! " * 40
        answer = await alice.ok(CHAT, chat(text, model=SERVED, max_tokens=20, ignore_eos=True))
        row = await gateway.row_of(answer.request_id)
        # The prompt is read in one pod and written on in the other, and counts once.
        assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt_tokens(text), 20)
    assert await asked(cluster.running[prefill], session) == 1
    assert await asked(cluster.running[decode], session) == 1
