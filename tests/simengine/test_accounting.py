"""Counters equal what was delivered, to the token: what a ledger is compared with must not be a guess."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simengine.faults import Faults
from tests.simengine.raw import CHAT, Engine, Raw, chat, payload, serving

PROMPT = "vllm:prompt_tokens_total"
GENERATED = "vllm:generation_tokens_total"


async def until_idle(engine: Engine) -> dict[str, float]:
    async with asyncio.timeout(60):
        while True:
            metrics = await engine.metrics()
            if not metrics["vllm:num_requests_running"] and not metrics["vllm:num_requests_waiting"]:
                assert metrics["vllm:kv_cache_usage_perc"] == 0
                return metrics
            await asyncio.sleep(0.005)


async def content_events(raw: Raw, count: int) -> None:
    """Read the head, the role event and so many tokens."""
    assert (await raw.head())[0] == 200
    for _ in range(1 + count):
        await raw.chunk()


_REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["chat", "completions", "responses", "messages", "embeddings", "rerank"]),
        st.integers(0, 60),
        st.integers(1, 20),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=20, deadline=None)
@given(_REQUESTS, st.sampled_from([{}, {"ttft_ms": 1.0}, {"itl_ms": 0.5}, {"tokens_per_step": 2}, {"max_running": 1}]))
def test_usage_of_all_answers_adds_up_to_the_counters(requests, latency):
    async def ask(engine: Engine, kind: str, size: int, limit: int, n: int, stream: bool) -> tuple[int, int]:
        text = "x" * size
        options = {"stream_options": {"include_usage": True}}
        if kind == "embeddings":
            usage = (await engine.json("/v1/embeddings", {"input": [text, text]}))["usage"]
            return usage["prompt_tokens"], 0
        if kind == "rerank":
            usage = (await engine.json("/v1/rerank", {"query": text, "documents": [text]}))["usage"]
            return usage["prompt_tokens"], 0
        if kind == "responses":
            body = {"input": text, "max_output_tokens": limit}
            if stream:
                usage = payload((await engine.stream("/v1/responses", body))[-1])["response"]["usage"]
            else:
                usage = (await engine.json("/v1/responses", body))["usage"]
            return usage["input_tokens"], usage["output_tokens"]
        if kind == "messages":
            body = {"messages": [{"content": text}], "max_tokens": limit}
            if stream:
                usage = payload((await engine.stream("/v1/messages", body))[-2])["usage"]
            else:
                usage = (await engine.json("/v1/messages", body))["usage"]
            return usage["input_tokens"], usage["output_tokens"]
        path = CHAT if kind == "chat" else "/v1/completions"
        body = chat(text, max_tokens=limit, n=n) if kind == "chat" else {"prompt": text, "max_tokens": limit, "n": n}
        if stream:
            usage = payload((await engine.stream(path, {**body, **options}))[-2])["usage"]
        else:
            usage = (await engine.json(path, body))["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    async def run() -> None:
        async with serving(**latency) as engine:
            told = await asyncio.gather(*(ask(engine, *request) for request in requests))
            metrics = await until_idle(engine)
            assert metrics[PROMPT] == sum(prompt for prompt, _ in told)
            assert metrics[GENERATED] == sum(completion for _, completion in told)
            assert metrics["vllm:request_success_total"] == len(requests)

    asyncio.run(run())


@pytest.mark.parametrize("half", [False, True])
async def test_a_client_that_leaves_stops_the_generation_at_once(half):
    async with serving(itl_ms=5, default_output_tokens=10_000) as engine:
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True))
            await content_events(raw, 5)
            if half:
                raw.writer.write_eof()
                await raw.rest()
        metrics = await until_idle(engine)
        # What was on its way when the client left counts: few tokens, not thousands.
        assert 5 <= metrics[GENERATED] < 1000
        assert metrics[PROMPT] == 3
        assert metrics["vllm:request_success_total"] == 0, "vLLM counts no abort"
        later = await engine.metrics()
        assert later[GENERATED] == metrics[GENERATED]


async def test_a_client_that_leaves_before_its_plain_answer_is_counted_by_what_was_generated():
    async with serving(itl_ms=5, default_output_tokens=10_000) as engine:
        async with engine.connect() as raw:
            raw.post(CHAT, chat())
            while (await engine.metrics())[GENERATED] <= 3:  # noqa: ASYNC110 - a metrics page wakes nobody
                await asyncio.sleep(0.005)
        metrics = await until_idle(engine)
        assert 3 < metrics[GENERATED] < 5000


async def test_a_client_that_leaves_the_queue_was_never_computed():
    async with serving(max_running=1, allow_fault_headers=True) as engine:
        async with engine.connect() as first, engine.connect() as second:
            # It runs, and is silent, until its client leaves.
            first.post(CHAT, chat(stream=True, max_tokens=5), "x-sim-fault: stall_after_chunks=1")
            await content_events(first, 1)
            second.post(CHAT, chat(stream=True, max_tokens=1))
            # Status and headers come even while the request waits.
            assert (await second.head())[0] == 200
            metrics = await engine.metrics()
            assert metrics["vllm:num_requests_waiting"] == 1
            second.writer.close()
            async with asyncio.timeout(60):
                while (await engine.metrics())["vllm:num_requests_waiting"]:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.005)
        metrics = await until_idle(engine)
        assert metrics[GENERATED] == 1
        assert metrics[PROMPT] == 3


async def test_waiting_requests_run_in_order_of_arrival():
    async with serving(ttft_ms=3, max_running=2) as engine:
        done: list[int] = []

        async def ask(number: int) -> None:
            await engine.json(CHAT, chat(max_tokens=1))
            done.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(ask(number))
                await asyncio.sleep(0.001)
        assert all(abs(number - place) <= 1 for place, number in enumerate(done))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_refuses_with_503_before_any_header(stream):
    async with serving(ttft_ms=10_000, max_queued_requests=2, max_running=1) as engine:
        async with engine.connect() as one, engine.connect() as two:
            for raw in (one, two):
                raw.post(CHAT, chat(stream=True))
                await raw.head()
            error = await engine.json(CHAT, chat(stream=stream), status=503)
            assert error["error"]["type"] == "Service Unavailable"
            metrics = await engine.metrics()
            assert metrics['vllm:admission_rejections_total{reason="max_num_queued_reqs"}'] == 1
            assert metrics["vllm:num_requests_running"] == 1
            assert metrics["vllm:num_requests_waiting"] == 1
        assert (await until_idle(engine))[GENERATED] == 0


async def test_sglang_refuses_a_stream_inside_the_stream():
    async with serving(flavor="sglang", ttft_ms=10_000, max_queued_requests=1) as engine, engine.connect() as raw:
        raw.post(CHAT, chat(stream=True))
        await raw.head()
        events = await engine.stream(CHAT, chat())
        assert payload(events[0])["error"]["code"] == 503
        assert events[1] == b"data: [DONE]"
        assert (await engine.post(CHAT, chat()))[0] == 503


async def test_kv_blocks_bound_what_runs_together():
    async with serving(ttft_ms=5_000, kv_blocks=10, block_size_tokens=16, max_model_len=160) as engine:
        async with engine.connect() as one, engine.connect() as two:
            for raw in (one, two):
                raw.post(CHAT, chat("x" * 320, stream=True, max_tokens=16))
                await raw.head()
            metrics = await engine.metrics()
            assert metrics["vllm:num_requests_running"] == 1
            assert metrics["vllm:num_requests_waiting"] == 1
        await until_idle(engine)


async def test_kv_usage_grows_with_the_tokens():
    faults = Faults(stall_after_chunks=40)
    async with serving(kv_blocks=10, block_size_tokens=16, faults=faults) as engine, engine.connect() as raw:
        raw.post(CHAT, chat("x" * 160, stream=True, max_tokens=100))
        await content_events(raw, 40)
        assert 0.5 <= (await engine.metrics())["vllm:kv_cache_usage_perc"] <= 0.875


async def test_latencies_are_kept():
    loop = asyncio.get_running_loop()
    between_s = []
    # Tokens of a stream that was held up follow each other faster: of five streams one is not.
    while not between_s or (len(between_s) < 5 and between_s[-1] < 0.09):
        async with serving(ttft_ms=60, itl_ms=10) as engine, engine.connect() as raw:
            began_s = loop.time()
            raw.post(CHAT, chat(stream=True, max_tokens=11))
            await content_events(raw, 1)
            assert loop.time() - began_s >= 0.055
            await raw.chunks()
            metrics = await engine.metrics()
            assert metrics["vllm:inter_token_latency_seconds_count"] == 10
            between_s.append(metrics["vllm:inter_token_latency_seconds_sum"])
    assert between_s[-1] >= 0.09


async def test_the_prefix_cache_is_counted():
    async with serving(prefix_cache=True) as engine:
        for _ in range(2):
            await engine.json(CHAT, chat("x" * 640))
        metrics = await engine.metrics()
        assert metrics["vllm:prefix_cache_hits_total"] == 144
        assert metrics['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == 176


async def test_metrics_are_wellformed_exposition():
    from prometheus_client.parser import text_string_to_metric_families

    for flavor in ("vllm", "sglang"):
        async with serving(flavor=flavor, models=('odd"name\\',)) as engine:
            await engine.json(CHAT, {"messages": [{"content": "x"}]})
            text = (await engine.get("/metrics")).decode()
            families = {family.name: family for family in text_string_to_metric_families(text)}
            name = f"{flavor}:generation_tokens"
            assert families[name].samples[0].value == 16
            assert families[name].samples[0].labels["model_name"] == 'odd"name\\'


async def test_recorded_requests_can_be_cleared():
    async with serving(record=5) as engine, engine.connect() as raw:
        await engine.json(CHAT, chat())
        raw.send(b"DELETE /sim/requests HTTP/1.1\r\nhost: x\r\n\r\n")
        status, _, told = await raw.answer()
        assert (status, len(json.loads(told))) == (200, 1)
        assert json.loads(await engine.get("/sim/requests")) == []
