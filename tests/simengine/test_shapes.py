"""Bodies and events as the engines write them: where usage stands, what is null, what is absent."""

import json

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simengine.vocabulary import Vocabulary, count_tokens
from tests.simengine.raw import CHAT, chat, payload, serving

USAGE = {"include_usage": True}


def contents(events: list[bytes]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        if event != b"data: [DONE]"
        for choice in payload(event)["choices"]
    )


async def test_a_plain_chat_answer():
    async with serving() as engine:
        answer = await engine.json(CHAT, chat(model="alias", max_tokens=5), "x-request-id: R")
        assert answer["id"] == "chatcmpl-R"
        assert answer["model"] == "sim", "the first name answers for all"
        assert answer["usage"] == {
            "prompt_tokens": 3,
            "total_tokens": 8,
            "completion_tokens": 5,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        assert answer["choices"][0]["finish_reason"] == "length"
        assert len(answer["choices"][0]["message"]["content"].split()) == 5


async def test_an_answer_remembered_is_the_same_but_for_its_id():
    async with serving() as engine:
        answers = [await engine.json(CHAT, chat(), f"x-request-id: r{number}") for number in range(3)]
        assert [answer.pop("id") for answer in answers] == ["chatcmpl-r0", "chatcmpl-r1", "chatcmpl-r2"]
        for answer in answers:
            answer.pop("created")
        assert answers[0] == answers[1] == answers[2]
        streamed = await engine.stream(CHAT, chat())
        assert contents(streamed) == answers[0]["choices"][0]["message"]["content"]


async def test_a_stream_carries_no_usage_unless_asked():
    async with serving() as engine:
        events = await engine.stream(CHAT, chat(max_tokens=3, stream_options={"continuous_usage_stats": True}))
        assert events[-1] == b"data: [DONE]"
        assert len(events) == 1 + 3 + 1
        assert payload(events[0])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all("usage" not in payload(event) for event in events[:-1])
        reasons = [payload(event)["choices"][0]["finish_reason"] for event in events[:-1]]
        assert reasons == [None, None, None, "length"]
        assert "system_fingerprint" in payload(events[-2])


async def test_usage_asked_for_comes_in_a_chunk_of_its_own():
    async with serving() as engine:
        events = await engine.stream(CHAT, chat(max_tokens=3, stream_options=USAGE))
        last = payload(events[-2])
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
        assert "system_fingerprint" in last
        assert all("usage" not in payload(event) for event in events[:-2])
        assert "system_fingerprint" not in payload(events[-3])


async def test_continuous_usage_counts_up():
    async with serving() as engine:
        options = {**USAGE, "continuous_usage_stats": True}
        events = await engine.stream(CHAT, chat(max_tokens=3, stream_options=options))
        assert [payload(event)["usage"]["completion_tokens"] for event in events[:-1]] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("placement", "where"),
    [("own", []), ("finish", [3]), ("continuous", [0, 1, 2, 3, 4]), ("never", [])],
)
async def test_usage_placements_of_other_engines(placement, where):
    async with serving(usage=placement) as engine:
        events = await engine.stream(CHAT, chat(max_tokens=3))
        assert [index for index, event in enumerate(events[:-1]) if "usage" in payload(event)] == where
        asked = await engine.stream(CHAT, chat(max_tokens=3, stream_options=USAGE))
        assert any(b'"usage"' in event for event in asked) == (placement != "never")


async def test_several_choices_count_the_prompt_once():
    async with serving() as engine:
        answer = await engine.json(CHAT, chat(n=3, max_tokens=4))
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 12
        assert len({choice["message"]["content"] for choice in answer["choices"]}) == 3
        events = await engine.stream(CHAT, chat(n=3, max_tokens=4, stream_options=USAGE))
        assert payload(events[-2])["usage"]["completion_tokens"] == 12
        assert len(events) == 3 + 12 + 1 + 1
        assert (await engine.json(CHAT, chat(n=2, temperature=0), status=400))["error"]["param"] == "n"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_the_text_and_its_tokens_are_counted(stream):
    async with serving() as engine:
        full = (await engine.json(CHAT, chat(max_tokens=12)))["choices"][0]["message"]["content"]
        words = full.split(" ")
        stop = words[6]
        at = full.index(stop)
        if stream:
            events = await engine.stream(CHAT, chat(max_tokens=12, stop=stop, stream_options=USAGE))
            text, usage = contents(events), payload(events[-2])["usage"]
        else:
            answer = await engine.json(CHAT, chat(max_tokens=12, stop=[stop, "absent"]))
            text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["choices"][0]["stop_reason"] == stop
        assert text == full[:at]
        assert usage["completion_tokens"] == len(full[: at + len(stop)].rstrip().split())


async def test_completions_sum_their_prompts_and_write_null_usage_on_every_chunk():
    async with serving() as engine:
        body = {"prompt": ["aaaa", "bbbbb"], "max_tokens": 2}
        answer = await engine.json("/v1/completions", body)
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 4
        events = await engine.stream("/v1/completions", {**body, "stream_options": USAGE})
        assert [payload(event)["usage"] for event in events[:4]] == [None] * 4
        assert payload(events[4])["usage"]["completion_tokens"] == 4
        assert (await engine.json("/v1/completions", {"prompt": [1, 2, 3]}))["usage"]["prompt_tokens"] == 3
        assert (await engine.json("/v1/completions", {"prompt": "x"}))["usage"]["completion_tokens"] == 16
        await engine.json("/v1/completions", {"prompt": []}, status=400)


async def test_responses_events_are_numbered_and_end_with_the_usage():
    async with serving() as engine:
        body = {"input": "hello there", "max_output_tokens": 3}
        answer = await engine.json("/v1/responses", body)
        assert answer["usage"]["input_tokens"] == 3
        assert answer["usage"]["output_tokens"] == 3
        events = await engine.stream("/v1/responses", body)
        parsed = [payload(event) for event in events]
        assert [each["sequence_number"] for each in parsed] == list(range(len(parsed)))
        assert [each["type"] for each in parsed] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * 3,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert parsed[0]["response"]["usage"] is None
        assert parsed[-1]["response"]["usage"] == answer["usage"]
        assert list(parsed[-1]) == ["response", "sequence_number", "type"]
        parts = {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "abcd"}]}],
            "instructions": "efgh",
        }
        assert (await engine.json("/v1/responses", parts))["usage"]["input_tokens"] == 2


async def test_messages_split_the_input_at_the_end_only():
    async with serving(prefix_cache=True, prompt_tokens_details=True) as engine:
        text = "x" * 640
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        first = await engine.json("/v1/messages", body)
        assert first["usage"] == {
            "input_tokens": 16,
            "output_tokens": 2,
            "cache_creation_input_tokens": 144,
            "cache_read_input_tokens": 0,
        }
        events = await engine.stream("/v1/messages", body)
        start, delta = payload(events[0]), payload(events[-2])
        assert start["message"]["usage"] == {"input_tokens": 160, "output_tokens": 0}
        assert delta["usage"]["input_tokens"] == 16
        assert delta["usage"]["cache_read_input_tokens"] == 144
        assert delta["usage"]["output_tokens"] == 2
        assert events[-1].startswith(b"event: message_stop")
        error = await engine.json("/v1/messages", {**body, "model": "other"}, status=404)
        assert error["type"] == "error"
        assert error["error"]["type"] == "NotFoundError", "vLLM's word in Anthropic's form"


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
async def test_a_tool_that_is_insisted_on_is_called(choice):
    async with serving() as engine:
        asked = chat(tools=TOOLS, tool_choice=choice, stream_options=USAGE)
        answer = await engine.json(CHAT, asked)
        called = answer["choices"][0]["message"]["tool_calls"][0]
        assert called["function"]["name"] == "look"
        assert len(json.loads(called["function"]["arguments"])["text"].split()) == 16
        assert answer["choices"][0]["message"]["content"] is None
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["usage"]["completion_tokens"] == 16
        chunks = [payload(event) for event in (await engine.stream(CHAT, asked))[:-1]]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert [call["function"].get("name") for call in calls] == ["look"] + [None] * 16
        said = "".join(call["function"].get("arguments", "") for call in calls)
        assert said == called["function"]["arguments"]
        assert deltas[-1] == {}
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[-1]["usage"]["completion_tokens"] == 16


async def test_a_tool_that_may_be_called_is_not():
    async with serving() as engine:
        answer = await engine.json(CHAT, chat(tools=TOOLS, tool_choice="auto"))
        assert answer["choices"][0]["message"]["tool_calls"] == []
        assert answer["choices"][0]["message"]["content"]


async def test_a_tool_called_in_messages():
    async with serving(awkward_text=True) as engine:
        tools = [{"name": "look", "input_schema": {"type": "object"}}]
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "tools": tools}
        for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
            answer = await engine.json("/v1/messages", {**body, "tool_choice": choice})
            block = answer["content"][0]
            assert (block["type"], block["name"]) == ("tool_use", "look")
            events = [payload(event) for event in await engine.stream("/v1/messages", {**body, "tool_choice": choice})]
            parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
            assert len(parts) == 40
            assert json.loads("".join(parts)) == block["input"]


async def test_log_probabilities_of_every_token():
    async with serving() as engine:
        asked = chat(max_tokens=3, logprobs=True, top_logprobs=2)
        choice = (await engine.json(CHAT, asked))["choices"][0]
        told = choice["logprobs"]["content"]
        assert "".join(each["token"] for each in told) == choice["message"]["content"]
        assert [len(each["top_logprobs"]) for each in told] == [2, 2, 2]
        chunks = [payload(event)["choices"][0] for event in (await engine.stream(CHAT, asked))[1:-1]]
        assert [chunk["logprobs"]["content"] for chunk in chunks] == [[each] for each in told]
        assert chunks[-1]["finish_reason"] == "length"


async def test_counting_tokens_costs_none_and_agrees_with_the_message():
    async with serving() as engine:
        body = {"model": "sim", "system": "abcd", "messages": [{"role": "user", "content": "efghi"}]}
        counted = await engine.json("/v1/messages/count_tokens", body)
        assert counted == {"input_tokens": 3}
        assert (await engine.json("/v1/messages", {**body, "max_tokens": 1}))["usage"]["input_tokens"] == 3
        error = await engine.json("/v1/messages/count_tokens", {**body, "model": "other"}, status=404)
        assert error["type"] == "error"
        assert (await engine.metrics())["vllm:prompt_tokens_total"] == 3


async def test_embeddings_rerank_and_score():
    async with serving() as engine:
        answer = await engine.json("/v1/embeddings", {"input": ["aaaa", "bbbbb"], "dimensions": 4})
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 0
        assert [len(each["embedding"]) for each in answer["data"]] == [4, 4]
        ranked = await engine.json("/v1/rerank", {"query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2})
        assert ranked["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        values = [each["relevance_score"] for each in ranked["results"]]
        assert len(values) == 2
        assert values == sorted(values, reverse=True)
        scored = await engine.json("/v1/score", {"text_1": "q", "text_2": ["a", "b"]})
        assert len(scored["data"]) == 2
        await engine.json("/v1/score", {"text_1": ["q", "r"], "text_2": ["a"]}, status=400)


async def test_cached_tokens_are_whole_blocks_and_never_the_last_token():
    async with serving(prefix_cache=True, prompt_tokens_details=True, block_size_tokens=32) as engine:
        text = "".join(str(number % 10) for number in range(227 * 4))
        answers = [(await engine.json(CHAT, chat(each)))["usage"] for each in (text, text, text[:800] + "other")]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in answers] == [0, 224, 192]
        exact = "y" * 4 * 64
        for expected in (0, 32):
            usage = (await engine.json(CHAT, chat(exact)))["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == expected


async def test_refusals_of_vllm():
    async with serving(max_model_len=100) as engine:
        unknown = await engine.json(CHAT, chat(model="other"), status=404)
        assert unknown["error"]["param"] == "model"
        assert "sim, alias" in unknown["error"]["message"]
        long = await engine.json(CHAT, chat("x" * 400), status=400)
        assert long["error"]["param"] == "input_tokens"
        assert (await engine.json(CHAT, chat(max_tokens=101), status=400))["error"]["code"] == 400
        assert (await engine.json(CHAT, chat(max_tokens=100)))["usage"]["total_tokens"] == 100, "cut silently"
        for wrong in (0, -1):
            assert (await engine.json(CHAT, chat(max_tokens=wrong), status=400))["error"]["param"] == "max_tokens"
        assert (await engine.json(CHAT, {"messages": [{"role": "user", "content": "x"}]}))["model"] == "sim"


async def test_sglang_differs_where_it_does():
    async with serving(flavor="sglang", prompt_tokens_details=True, max_model_len=100) as engine:
        answer = await engine.json(CHAT, chat(model="anything", max_tokens=2), "x-request-id: R")
        assert answer["model"] == "anything"
        assert answer["id"] == "R"
        assert answer["usage"]["reasoning_tokens"] == 0
        events = await engine.stream(CHAT, chat(max_tokens=2, stream_options=USAGE))
        reasons = [[choice["finish_reason"] for choice in payload(event)["choices"]] for event in events[:-1]]
        assert reasons == [[None], [None], [None], ["length"], []]
        continuous = {**USAGE, "continuous_usage_stats": True}
        events = await engine.stream(CHAT, chat(max_tokens=2, stream_options=continuous))
        assert ["usage" in payload(event) for event in events[:-1]] == [False, True, True, False, True]
        assert (await engine.json(CHAT, chat(max_tokens=100), status=400))["object"] == "error"
        ended = await engine.stream("/v1/responses", {"input": "x", "max_output_tokens": 2})
        assert payload(ended[-1])["type"] == "response.incomplete"
        assert await engine.get("/ready") == b""
        assert json.loads(await engine.get("/v1/loads"))["loads"][0]["num_running_reqs"] == 0
        metrics = await engine.metrics()
        assert metrics["sglang:num_running_reqs"] == 0
        assert metrics["sglang:generation_tokens_total"] == 8
        assert metrics["sglang:num_requests_total"] == 5


async def test_a_library_client_understands_it_all():
    async with serving() as engine, aiohttp.ClientSession(engine.url) as session:
        async with session.get("/v1/models") as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == ["sim", "alias"]
        async with session.post(CHAT, json=chat(stream=True), compress=False) as answer:
            assert answer.content_type == "text/event-stream"
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        headers = {"endpoint-load-metrics-format": "JSON"}
        async with session.post(CHAT, json=chat(), headers=headers) as answer:
            kind, _, load = answer.headers["endpoint-load-metrics"].partition(" ")
            assert kind == "JSON"
            assert json.loads(load)["named_metrics"]["num_requests_waiting"] == 0


async def test_awkward_text_is_the_same_streamed_and_whole():
    async with serving(awkward_text=True) as engine:
        for number in range(10):
            body = chat(f"prompt {number}", max_tokens=200)
            whole = (await engine.json(CHAT, body))["choices"][0]["message"]["content"]
            assert contents(await engine.stream(CHAT, body)) == whole
        assert '"usage"' in whole


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(0, 5))
def test_a_prompt_never_has_more_tokens_than_bytes(text, media):
    size = len(text.encode())
    assert 1 <= count_tokens(size) <= max(1, size)
    assert count_tokens(size, media) >= count_tokens(size)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(0, 10_000), st.booleans())
def test_the_same_seed_says_the_same(seed, count, awkward):
    one, two = Vocabulary(seed, awkward), Vocabulary(seed, awkward)
    start = one.start(b"prompt", 7, 1)
    assert start == two.start(b"prompt", 7, 1)
    words = one.words(start, count)
    assert len(words) == count
    assert words == two.words(start, count)
    quoted = one.quoted_words(start, count)
    assert json.loads(b'"' + b"".join(quoted) + b'"') == "".join(words)
    if not awkward:
        assert Vocabulary(seed + 1).words(start, 50) != one.words(start, 50)
