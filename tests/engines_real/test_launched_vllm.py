"""One pod of a generated ArksApplication, its very command line run by a real vLLM: from its first probe to its exit.

One engine for all tests, which run in the order of its life; the last one ends it.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import pytest

from controller.engines import vllm
from controller.weights.scraper import Scraper
from scripts import engines
from tests.engines_real.client import CHAT, COMPLETIONS, Client, chat
from tests.engines_real.conftest import POLICY, SLOW_START
from tests.engines_real.generated import application, pods
from tests.engines_real.launched import START_TIMEOUT_S, Container
from tests.harness.gateway import Gateway, running_gateway, sum_series

pytestmark = SLOW_START

PORT = 9001
CONTEXT_TOKENS = 3072
PROBES = ("startup", "readiness", "liveness")


@dataclass
class Started:
    container: Container
    looks: list[tuple[bool, ...]]
    """the three probes, again and again until one held"""
    answered: int
    """status of a chat right after"""


@pytest.fixture(scope="module")
def started(made, tmp_path_factory) -> Iterator[Started]:
    desired = application(
        f"--port={PORT}",
        # One entry with the quotes that a shell would have taken off, and one value in an entry of its own.
        "--override-generation-config '{\"temperature\": 0.0}'",
        "--hf-overrides",
        json.dumps({"max_position_embeddings": CONTEXT_TOKENS}),
        loraAdapters=[{"name": "accented", "model": {"name": "accent"}}],
    )
    (pod,) = pods(desired).values()
    container = Container(pod, tmp_path_factory.mktemp("pod"), {"models": engines.models()})
    looks = []
    try:
        container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not any(looks[-1:] and looks[-1]):
            assert container.exit_status is None, container.log[-4000:]
            assert time.monotonic() < deadline, container.log[-4000:]
            looks.append(tuple(container.probe(kind) for kind in PROBES))
            time.sleep(0.2)
        yield Started(container, looks, asyncio.run(_status(container)))
    finally:
        container.kill()


async def _status(container: Container) -> int:
    async with aiohttp.ClientSession() as session:
        return (await Client(session, container.url).ask(CHAT, chat(max_tokens=1))).status


@pytest.fixture(scope="module")
def container(started) -> Container:
    return started.container


@pytest.fixture(scope="module")
def fronted(container, tmp_path_factory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [container.url]) as one:
        yield one


@pytest.fixture
def direct(container, session) -> Client:
    return Client(session, container.url)


@pytest.fixture
def tenant(fronted, session) -> Client:
    return Client(session, fronted.url, "sk-alice")


def test_no_probe_holds_before_the_engine_answers_a_chat_and_then_all_do(started):
    assert started.looks[0] == (False, False, False)
    assert started.answered == 200
    assert [started.container.probe(kind) for kind in PROBES] == [True, True, True]


def test_it_is_a_pod_for_cpus(container):
    assert container.spec["image"].startswith("vllm/vllm-openai-cpu:")
    assert container.spec["resources"]["requests"] == {"cpu": "1", "memory": "4Gi"}


async def test_the_users_port_is_that_of_the_process_and_of_everything_that_asks_it(container, direct: Client):
    assert container.url.endswith(f":{PORT}")
    assert {container.spec[f"{kind}Probe"]["httpGet"]["port"] for kind in PROBES} == {PORT}
    await direct.ok(COMPLETIONS, {"model": "tiny-chat", "prompt": "Hello", "max_tokens": 1})


async def test_json_options_arrive_whole_in_either_way_of_writing_them(container, direct: Client, session):
    async with session.get(f"{container.url}/v1/models") as answer:
        found = {one["id"]: one for one in (await answer.json())["data"]}
    assert found["tiny-chat"]["max_model_len"] == CONTEXT_TOKENS
    greedy = await direct.ok(CHAT, chat(max_tokens=40, temperature=0.0))
    default = await direct.ok(CHAT, chat(max_tokens=40))
    warm = await direct.ok(CHAT, chat(max_tokens=40, temperature=2.0))
    assert said(default) == said(greedy) != said(warm)


async def test_an_adapter_answers_under_its_own_name_and_in_its_own_way(container, direct: Client, session):
    async with session.get(f"{container.url}/v1/models") as answer:
        found = {one["id"]: one for one in (await answer.json())["data"]}
    assert found["accented"]["parent"] == "tiny-chat"
    base = await direct.ok(CHAT, chat(max_tokens=40))
    accented = await direct.ok(CHAT, {**chat(max_tokens=40), "model": "accented"})
    assert said(base) != said(accented)


def said(answer) -> str:
    return answer.json["choices"][0]["message"]["content"]


async def test_its_load_is_read_from_the_metrics_that_we_know_by_name(container, direct: Client, session):
    address = container.url.removeprefix("http://")
    idle = (await Scraper(timeout_s=10).sweep([address]))[address]
    assert (idle.known, idle.healthy, idle.running) == (True, True, 0)
    async with direct.stream(CHAT, chat(max_tokens=2000, ignore_eos=True, stream=True)) as (_, events):
        for _ in range(5):
            await anext(events)
        busy = (await Scraper(timeout_s=10).sweep([address]))[address]
    assert busy.running == 1
    assert busy.kv_usage > 0
    async with session.get(f"{container.url}{vllm.METRICS.path}") as answer:
        page = await answer.text()
    for name in (vllm.METRICS.running, vllm.METRICS.waiting, vllm.METRICS.kv_usage):
        assert f"\n{name}{{" in page
    for name in (vllm.METRICS.ttft_seconds, vllm.METRICS.itl_seconds):
        assert sum_series(page, f"{name}_count") > 0
    for name in (vllm.METRICS.prompt_tokens, vllm.METRICS.generation_tokens):
        assert sum_series(page, name) > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_tenants_are_served_through_the_gateway_and_charged_to_the_token(fronted, tenant: Client, stream):
    answer = await tenant.ok(CHAT, chat(max_tokens=12, ignore_eos=True, stream=stream))
    row = await fronted.row_of(answer.request_id)
    assert (row["status"], row["accuracy"], row["completion_tokens"]) == (200, "exact", 12)
    assert row["prompt_tokens"] > 5


async def test_a_deleted_pod_serves_until_its_endpoint_is_gone_and_ends_with_its_last_stream(
    fronted, tenant: Client, direct: Client, container
):
    """The hook's sleep, then SIGTERM with an open stream; the exit is the engine's own, inside the grace period."""
    until = time.monotonic() + container.grace_s
    leaving = asyncio.create_task(asyncio.to_thread(container.pre_stop))
    served = 0
    while not leaving.done():
        assert (await direct.ask(CHAT, chat(max_tokens=1))).status == 200
        served += 1
    await leaving
    assert served > 0
    tokens = 1200
    async with tenant.stream(CHAT, chat(max_tokens=tokens, ignore_eos=True, stream=True)) as (request_id, events):
        for _ in range(10):
            await anext(events)
        container.terminate()
        data = [one async for one in events]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
    row = await fronted.row_of(request_id)
    assert (row["completion_tokens"], row["accuracy"], row["error"]) == (tokens, "exact", "")
    assert await asyncio.to_thread(container.wait_ended, until - time.monotonic()) == 0
    assert not any(container.probe(kind) for kind in PROBES)
