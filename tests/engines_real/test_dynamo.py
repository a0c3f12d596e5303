"""The pod that Arks makes for Dynamo where the cluster has no discovery for it: frontend and worker side by side.

Dynamo's frontend and runtime are the real ones, the engine is its mocker (see `dynamo_pods`). Its tokens are counted by
three: the frontend's own counters, this test, and the ledger behind the gateway.
"""

import asyncio
import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from controller.engines import dynamo, vllm
from controller.weights.metrics import from_page
from scripts import engines
from tests.engines_real.applications import SERVED, application
from tests.engines_real.applications import leader_pod as leader
from tests.engines_real.client import CHAT, COMPLETIONS, Client, body_for, chat
from tests.engines_real.dynamo_model import prompt_tokens, write_model
from tests.engines_real.dynamo_pods import FRONTEND, WORKER, containers, mocked
from tests.engines_real.launched import running
from tests.engines_real.pod_container import PodContainer
from tests.harness.gateway import Gateway, endpoint, policy, running_gateway, sum_series, token, until

POLICY = policy(endpoint(SERVED), token("alice", "sk-alice", (SERVED,), rates={"rpm": 10**6, "tpm": 10**9}))
GRACE_S = 24
"""of which a quarter passes before the worker is asked whether it is idle"""
_names = itertools.count()

Pod = dict[str, PodContainer]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    engines.make_environment(engines.DYNAMO)
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "chat")
    return folder


@pytest.fixture(scope="module")
def new_pod(weights, tmp_path_factory) -> Callable[..., Pod]:
    def make(*, without: str = "") -> Pod:
        desired = application("dynamo", instanceSpec={"terminationGracePeriodSeconds": GRACE_S})
        tree = mocked(leader(desired, f"chat-{next(_names)}"))
        if without:
            tree = copy.deepcopy(tree)
            for each in tree["spec"]["containers"]:
                each["env"] = [item for item in each["env"] if item["name"] != without]
        folder = tmp_path_factory.mktemp("pod")
        volumes = {"models": weights, "arks-dynamo": folder / "arks-dynamo"}
        volumes["arks-dynamo"].mkdir()
        return containers(tree, folder, volumes)

    return make


@contextlib.contextmanager
def killed_at_last(pod: Pod) -> Iterator[tuple[PodContainer, PodContainer]]:
    """(worker, frontend), not started."""
    try:
        yield pod[WORKER], pod[FRONTEND]
    finally:
        for each in pod.values():
            each.kill()


def holds(pod: Pod, kind: str = "readiness", timeout_s: float = 60.0) -> None:
    """Until every container's probe does."""
    deadline = time.monotonic() + timeout_s
    while not all(each.probe(kind) for each in pod.values()):
        assert time.monotonic() < deadline, {name: each.log[-2000:] for name, each in pod.items()}
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pod(new_pod) -> Iterator[Pod]:
    one = new_pod()
    with running(one[FRONTEND], one[WORKER]):
        holds(one)
        yield one


@pytest.fixture(scope="module")
def dynamo_gateway(pod, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [pod[FRONTEND].url]) as one:
        yield one


@pytest.fixture
def alice(dynamo_gateway, session) -> Client:
    return Client(session, dynamo_gateway.url, "sk-alice")


async def page_of(session: aiohttp.ClientSession, container: PodContainer, port: str) -> str:
    async with session.get(f"http://{container.address}:{container.port(port)}/metrics") as answer:
        assert answer.status == 200
        return await answer.text()


def test_a_pod_is_ready_when_its_model_is_listed_and_not_before(new_pod):
    one = new_pod()
    with killed_at_last(one) as (worker, front):
        front.start()
        front.wait_started()
        assert front.probe("liveness")
        assert not front.probe("readiness")
        assert not worker.probe("startup")
        assert not worker.probe("readiness")
        worker.start()
        worker.wait_started()
        holds(one)
        assert worker.probe("liveness")


async def test_without_the_health_variable_a_serving_worker_would_never_be_ready(new_pod, session):
    one = new_pod(without="DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS")
    with killed_at_last(one) as (worker, front):
        front.start()
        worker.start()
        await until(lambda: front.probe("readiness"), 60)
        assert "dynamo_component_uptime_seconds" in await page_of(session, worker, "system")
        assert not worker.probe("startup")
        assert not worker.probe("readiness")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_token_is_in_the_ledger(path, stream, pod, dynamo_gateway, alice: Client, session):
    before = await page_of(session, pod[FRONTEND], "http")
    text = f"How are you, {path}?"
    answer = await alice.ok(path, body_for(path, text, 40, model=SERVED, stream=stream))
    if stream:
        assert answer.data[-1] == "[DONE]"
        # The usage that the gateway asked for is not for a client that did not.
        assert not any(each.get("usage") for each in answer.events)
        assert len(answer.events) > 30
    row = await dynamo_gateway.row_of(answer.request_id)
    prompt = prompt_tokens(text) if path == CHAT else len(text)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, 40)
    assert (row["accuracy"], row["status"], row["error"], row["model"]) == ("exact", 200, "", SERVED)
    after = await page_of(session, pod[FRONTEND], "http")

    def counted(name: str) -> float:
        return sum_series(after, name) - sum_series(before, name)

    assert counted("dynamo_frontend_input_sequence_tokens_sum") == prompt
    assert counted("dynamo_frontend_output_tokens_total") == 40


async def test_usage_is_passed_to_who_asked_for_it(dynamo_gateway, alice: Client):
    fields = {"model": SERVED, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    answer = await alice.ok(CHAT, chat(max_tokens=7, **fields))
    usage = answer.events[-1]["usage"]
    row = await dynamo_gateway.row_of(answer.request_id)
    assert usage["completion_tokens"] == row["completion_tokens"] == 7
    assert usage["prompt_tokens"] == row["prompt_tokens"] == prompt_tokens("Hello!")


async def test_the_model_is_listed_by_both(pod, alice: Client, session):
    async with session.get(f"{pod[FRONTEND].url}/v1/models") as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == [SERVED]
    async with session.get(f"{alice.url}/v1/models", headers=alice.headers) as answer:
        assert [one["id"] for one in (await answer.json())["data"]] == [SERVED]


async def test_the_series_that_we_name_are_there(pod, alice: Client, session):
    await alice.ok(CHAT, chat(max_tokens=3, model=SERVED))
    front = await page_of(session, pod[FRONTEND], "http")
    ours = dynamo.FRONTEND_METRICS
    for name in (ours.running, ours.waiting, f"{ours.ttft_seconds}_sum", f"{ours.itl_seconds}_count"):
        assert f"\n{name}{{" in front, name
    worker = await page_of(session, pod[WORKER], "system")
    for name in (vllm.METRICS.running, vllm.METRICS.waiting, vllm.METRICS.kv_usage, f"{vllm.METRICS.ttft_seconds}_sum"):
        assert f"\n{name}{{" in worker, name
    sample = from_page(worker.encode())
    assert sample is not None
    assert sample.ttft_count >= 1


async def test_the_workers_pre_stop_hook_ends_after_the_last_stream(pod, dynamo_gateway, alice: Client):
    ends: list[float] = []

    async def hook() -> None:
        await asyncio.to_thread(pod[WORKER].pre_stop)
        ends.append(time.monotonic())

    body = chat(max_tokens=1600, model=SERVED, ignore_eos=True, stream=True)
    async with alice.stream(CHAT, body) as (request_id, events):
        await anext(events)
        hooked = asyncio.create_task(hook())
        data = [one async for one in events]
        ended_s = time.monotonic()
    await hooked
    assert data[-1] == "[DONE]"
    row = await dynamo_gateway.row_of(request_id)
    assert (row["completion_tokens"], row["error"]) == (1600, "")
    assert ended_s < ends[0]
    # The worker has not been told to stop yet.
    assert (await alice.ask(CHAT, chat(max_tokens=1, model=SERVED))).status == 200


async def test_a_worker_killed_is_an_error_and_its_successor_serves(pod, dynamo_gateway, alice: Client):
    body = chat(max_tokens=3000, model=SERVED, ignore_eos=True, stream=True)
    async with alice.stream(CHAT, body) as (request_id, events):
        for _ in range(20):
            await anext(events)
        pod[WORKER].kill()
        data = [one async for one in events]
    # In Dynamo's own words, and [DONE] after it. It says 503, as an engine that is full does, and so does the row.
    assert '"error"' in data[-2]
    assert data[-1] == "[DONE]"
    row = await dynamo_gateway.row_of(request_id)
    assert (row["status"], row["error"], row["accuracy"]) == (200, "engine_overloaded", "estimated")
    assert row["completion_tokens"] >= 15

    answer = await alice.ask(CHAT, chat(max_tokens=1, model=SERVED))
    assert answer.status == 503, answer
    async with asyncio.timeout(30):  # it hears of the worker's end a moment later
        while await asyncio.to_thread(pod[FRONTEND].probe, "readiness"):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
    assert pod[FRONTEND].probe("liveness")

    pod[WORKER].start()
    pod[WORKER].wait_started()
    async with asyncio.timeout(60):
        while (answer := await alice.ask(CHAT, chat(max_tokens=1, model=SERVED))).status != 200:
            assert answer.status in {404, 503}, answer
            await asyncio.sleep(0.2)
    row = await dynamo_gateway.row_of(answer.request_id)
    assert (row["completion_tokens"], row["accuracy"]) == (1, "exact")


async def test_a_pod_that_is_deleted_ends_in_time_and_by_itself(pod, alice: Client):
    """The last of this file: the pod is gone after it."""
    statuses = await asyncio.gather(*(asyncio.to_thread(each.stop) for each in pod.values()))
    assert statuses == [0, 0]
    assert (await alice.ask(CHAT, chat(max_tokens=1, model=SERVED))).status == 503
