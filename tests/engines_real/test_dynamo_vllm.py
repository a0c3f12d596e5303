"""The same pod with the engine that its command line names: `python3 -m dynamo.vllm`, a real vLLM on the CPU.

All settings for CPUs are a user's (`instanceSpec`, `runtimeCommonArgs`). The worker's own counters are the ledger's
oracle, and the stream at the end is what a rollout must not cut: told to stop, this worker aborts after 5 s what runs.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from controller.engines import vllm
from controller.weights.metrics import from_page
from scripts import engines
from tests.engines_real.applications import SERVED, application, leader_pod
from tests.engines_real.client import CHAT, RESPONSES, Client, body_for, chat
from tests.engines_real.dynamo_pods import FRONTEND, WORKER, containers
from tests.engines_real.launched import running
from tests.engines_real.pod_container import PodContainer
from tests.harness.gateway import Gateway, endpoint, policy, running_gateway, sum_series, token, until

ADAPTER = "tiny-accent"
POLICY = policy(
    endpoint(SERVED),
    endpoint(ADAPTER),
    token("alice", "sk-alice", (SERVED, ADAPTER), rates={"rpm": 10**6, "tpm": 10**9}),
)
CONTEXT_TOKENS = 32_768
STREAM_S = 24
"""as long as a stream shall last: past the 15 s until the endpoint has left, and the worker's own 5 s"""
ON_CPU = {
    "runtimeImage": "registry.example/dynamo-vllm:1.6.1",
    "loraAdapters": [{"name": ADAPTER, "model": {"name": "accent"}}],
    "runtimeCommonArgs": [f"--max-model-len {CONTEXT_TOKENS}", "--block-size 32", "--enforce-eager"],
    "instanceSpec": {
        "resources": {"limits": {"cpu": "2", "memory": "6Gi"}},
        "env": [
            {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
            {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
            {"name": "VLLM_WORKER_MULTIPROC_METHOD", "value": "fork"},
            # Threads that wait for each other crawl where a processor is shared with anybody.
            {"name": "OMP_NUM_THREADS", "value": "1"},
            {"name": "TORCHDYNAMO_DISABLE", "value": "1"},
            # The tiny model says 4 096, and its words mean nothing anyway.
            {"name": "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "value": "1"},
        ],
    },
}

Pod = dict[str, PodContainer]


@pytest.fixture(scope="module")
def pod(made, tmp_path_factory) -> Iterator[Pod]:
    engines.make_environment(engines.DYNAMO)
    folder = tmp_path_factory.mktemp("pod")
    (folder / "arks-dynamo").mkdir()
    volumes = {"models": engines.models(), "arks-dynamo": folder / "arks-dynamo"}
    one = containers(leader_pod(application("dynamo", **ON_CPU)), folder, volumes, VLLM_NO_USAGE_STATS="1")
    with running(one[FRONTEND], one[WORKER]):
        assert one[WORKER].post_start() == 0
        yield one


@pytest.fixture(scope="module")
def dynamo_gateway(pod, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [pod[FRONTEND].url]) as one:
        yield one


@pytest.fixture
async def alice(dynamo_gateway) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=400)) as patient:
        yield Client(patient, dynamo_gateway.url, "sk-alice")


async def worker_page(pod: Pod, session) -> str:
    worker = pod[WORKER]
    async with session.get(f"http://{worker.address}:{worker.port('system')}/metrics") as answer:
        return await answer.text()


async def test_a_started_pod_is_ready(pod):
    await until(lambda: all(each.probe("readiness") and each.probe("liveness") for each in pod.values()), 60)


async def test_an_adapter_has_a_voice_of_its_own(dynamo_gateway, alice: Client):
    said = {}
    for model in (SERVED, ADAPTER):
        answer = await alice.ok(CHAT, chat(max_tokens=16, temperature=0, model=model))
        said[model] = answer.json["choices"][0]["message"]["content"]
        row = await dynamo_gateway.row_of(answer.request_id)
        assert (row["model"], row["completion_tokens"], row["accuracy"]) == (model, 16, "exact")
    assert said[SERVED] != said[ADAPTER]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_the_ledger_equals_the_engines_counters(path, stream, pod, dynamo_gateway, alice: Client, session):
    before = await worker_page(pod, session)
    answer = await alice.ok(path, body_for(path, "How are you?", 30, model=SERVED, stream=stream))
    row = await dynamo_gateway.row_of(answer.request_id)
    after = await worker_page(pod, session)

    def counted(name: str) -> float:
        return sum_series(after, name) - sum_series(before, name)

    assert counted(vllm.METRICS.prompt_tokens) == row["prompt_tokens"] > 10
    assert counted(vllm.METRICS.generation_tokens) == row["completion_tokens"] == 30
    assert (row["accuracy"], row["status"], row["error"]) == ("exact", 200, "")


async def test_the_series_that_we_name_are_there(pod, alice: Client, session):
    await alice.ok(CHAT, chat(max_tokens=3, model=SERVED))
    page = await worker_page(pod, session)
    ours = vllm.METRICS
    names = (ours.running, ours.waiting, ours.kv_usage, f"{ours.ttft_seconds}_sum", f"{ours.itl_seconds}_count")
    for name in (*names, ours.prompt_tokens, ours.generation_tokens):
        assert f"\n{name}{{" in page, name
    sample = from_page(page.encode())
    assert sample is not None
    assert sample.ttft_count >= 1


async def tokens_for(seconds: float, alice: Client) -> int:
    """As many as this machine writes in that time, now."""
    start = time.monotonic()
    await alice.ok(CHAT, chat(max_tokens=400, ignore_eos=True, model=SERVED))
    return min(int(400 / (time.monotonic() - start) * seconds), CONTEXT_TOKENS - 100)


async def test_a_deleted_pod_finishes_its_streams_and_ends(pod, dynamo_gateway, alice: Client):
    """The last of this file: the pod is gone after it."""
    tokens = await tokens_for(STREAM_S, alice)
    body = chat(max_tokens=tokens, ignore_eos=True, model=SERVED, stream=True)
    async with alice.stream(CHAT, body) as (request_id, events):
        await anext(events)
        stopping = asyncio.gather(*(asyncio.to_thread(each.stop) for each in pod.values()))
        data = [one async for one in events]
    statuses = await stopping
    assert data[-1] == "[DONE]"
    assert '"error"' not in data[-2]
    row = await dynamo_gateway.row_of(request_id)
    assert (row["completion_tokens"], row["error"], row["accuracy"]) == (tokens, "", "exact")
    assert statuses == [0, 0]
