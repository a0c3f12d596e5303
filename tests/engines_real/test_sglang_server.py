"""SGLang's own server on the CPU, by the command line of the pod that Arks makes for it, and the gateway before it.

Its kernels for GPUs are a stand-in (`stand_ins`), and settings for CPUs are a user's. What it counts, what its probes
say and how it ends are its own.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from controller.engines import sglang
from controller.weights.metrics import Sample, from_loads, from_page
from scripts import engines
from tests.engines_real.applications import SERVED, application, leader_pod
from tests.engines_real.client import CHAT, COMPLETIONS, Client, body_for, chat
from tests.engines_real.launched import running
from tests.engines_real.pod_container import PodContainer, containers
from tests.harness.gateway import Gateway, endpoint, policy, running_gateway, sum_series, token, until

POLICY = policy(endpoint(SERVED), token("alice", "sk-alice", (SERVED,), rates={"rpm": 10**6, "tpm": 10**9}))
STAND_INS = Path(__file__).with_name("stand_ins")
STREAM_TOKENS = 1000
"""some seconds' worth, of which the first is over when the server is told to stop"""
ON_CPU = {
    "runtimeImage": "registry.example/sglang-cpu:v0.5.23",
    "runtimeCommonArgs": [
        *("--attention-backend torch_native", "--sampling-backend pytorch", "--grammar-backend none"),
        *("--disable-cuda-graph", "--disable-overlap-schedule", "--mem-fraction-static 0.1", "--max-total-tokens 8192"),
    ],
    "instanceSpec": {
        "resources": {"limits": {"cpu": "2", "memory": "6Gi"}},
        # Threads that wait for each other crawl where a processor is shared with anybody.
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
    },
}


@pytest.fixture(scope="module")
def server(made, tmp_path_factory) -> Iterator[PodContainer]:
    engines.make_environment(engines.SGLANG)
    tree = leader_pod(application("sglang", **ON_CPU))
    volumes = {"models": engines.models()}
    (one,) = containers(
        tree, engines.SGLANG, tmp_path_factory.mktemp("pod"), volumes, PYTHONPATH=str(STAND_INS)
    ).values()
    assert not one.probe("startup")
    with running(one):
        yield one


@pytest.fixture(scope="module")
def sglang_gateway(server, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [server.url]) as one:
        yield one


@pytest.fixture
async def alice(sglang_gateway) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=400)) as patient:
        yield Client(patient, sglang_gateway.url, "sk-alice")


async def text_of(server: PodContainer, path: str, session) -> str:
    async with session.get(f"{server.url}{path}") as answer:
        assert answer.status == 200
        return await answer.text()


async def test_a_started_pod_is_ready(server):
    await until(lambda: server.probe("readiness") and server.probe("liveness"), 120)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_ledger_equals_the_engines_counters(path, stream, server, sglang_gateway, alice: Client, session):
    page = sglang.METRICS.path
    before = await text_of(server, page, session)
    answer = await alice.ok(path, body_for(path, "How are you?", 30, model=SERVED, stream=stream))
    row = await sglang_gateway.row_of(answer.request_id)
    told = (row["prompt_tokens"], row["completion_tokens"])
    names = (sglang.METRICS.prompt_tokens, sglang.METRICS.generation_tokens)

    async def counted() -> tuple[float, ...]:
        after = await text_of(server, page, session)
        return tuple(sum_series(after, name) - sum_series(before, name) for name in names)

    async with asyncio.timeout(60):
        while await counted() == (0, 0):  # noqa: ASYNC110 - it counts a moment after the answer
            await asyncio.sleep(0.1)
    assert await counted() == told
    assert told[0] > 10
    assert (told[1], row["accuracy"], row["status"], row["error"]) == (30, "exact", 200, "")


async def test_the_series_that_we_name_are_there(server, alice: Client, session):
    await alice.ok(CHAT, chat(max_tokens=5, model=SERVED, stream=True))
    page = await text_of(server, sglang.METRICS.path, session)
    ours = sglang.METRICS
    names = (ours.running, ours.waiting, ours.kv_usage, f"{ours.ttft_seconds}_sum", f"{ours.itl_seconds}_count")
    for name in (*names, ours.prompt_tokens, ours.generation_tokens):
        assert f"\n{name}{{" in page, name
    assert from_page(page.encode()) is not None


async def loads(server: PodContainer, session) -> Sample:
    found = from_loads((await text_of(server, sglang.METRICS.loads_path, session)).encode())
    assert found is not None
    return found


async def test_told_to_stop_it_is_not_ready_and_finishes_its_streams(server, sglang_gateway, alice: Client, session):
    """The last of this file: the pod is gone after it."""
    body = chat(max_tokens=STREAM_TOKENS, ignore_eos=True, model=SERVED, stream=True)
    async with alice.stream(CHAT, body) as (request_id, events):
        await anext(events)
        async with asyncio.timeout(60):
            while (await loads(server, session)).running != 1:  # noqa: ASYNC110 - it tells every now and then
                await asyncio.sleep(0.1)
        server.terminate()
        await until(lambda: not server.probe("readiness"), 30)
        data = [one async for one in events]
    assert data[-1] == "[DONE]"
    row = await sglang_gateway.row_of(request_id)
    assert (row["completion_tokens"], row["error"], row["accuracy"]) == (STREAM_TOKENS, "", "exact")
    await asyncio.to_thread(server.wait_ended, server.grace_s)
