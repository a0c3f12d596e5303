"""OpenAI's SDK gets what it asks for, and the ledger has what it was told, to the token."""

import asyncio
import json

import openai as sdk
import pytest
from openai import OpenAI

from tests.clients.conftest import MESSAGES, MODEL, TIMEOUT_S, booked


def told(usage) -> tuple[int, int, int]:
    """A usage object in the ledger's order."""
    details = usage.prompt_tokens_details
    return usage.prompt_tokens, usage.completion_tokens, (details.cached_tokens or 0) if details else 0


async def text_of(stream) -> str:
    return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])


async def test_chat(gateway, openai):
    answer = await openai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=7)
    assert answer.usage.completion_tokens == 7
    assert len(answer.choices[0].message.content.split()) == 7
    assert await booked(gateway, answer._request_id) == told(answer.usage)


async def test_streamed_chat_says_what_the_plain_one_says(gateway, openai):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 9}
    plain = await openai.chat.completions.create(**asked)
    stream = await openai.chat.completions.create(**asked, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks), "nobody asked for usage"
    assert all(chunk.choices for chunk in chunks)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == plain.choices[0].message.content
    row = await booked(gateway, stream.response.headers["x-request-id"])
    assert row[:2] == told(plain.usage)[:2]


@pytest.mark.parametrize("choices", [1, 3])
async def test_usage_of_a_stream_that_asked_for_it(gateway, openai, choices):
    stream = await openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, n=choices, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5 * choices
    assert {choice.index for chunk in chunks for choice in chunk.choices} == set(range(choices))
    assert await booked(gateway, stream.response.headers["x-request-id"]) == told(chunks[-1].usage)


async def test_the_streaming_helper_puts_the_answer_together(gateway, openai):
    async with openai.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        kinds = {event.type async for event in stream}
        whole = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert len(whole.choices[0].message.content.split()) == 16


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


async def test_a_tool_call(gateway, openai):
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    answer = await openai.chat.completions.create(**asked)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)
    assert await booked(gateway, answer._request_id) == told(answer.usage)
    async with openai.chat.completions.stream(**asked) as stream:
        whole = await stream.get_final_completion()
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    assert whole.choices[0].finish_reason == "tool_calls"


async def test_log_probabilities(gateway, openai):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    answer = await openai.chat.completions.create(**asked)
    tokens = [each.token for each in answer.choices[0].logprobs.content]
    assert "".join(tokens) == answer.choices[0].message.content
    stream = await openai.chat.completions.create(**asked, stream=True)
    choices = [choice async for chunk in stream for choice in chunk.choices]
    streamed = [each.token for choice in choices if choice.logprobs for each in choice.logprobs.content]
    assert streamed == tokens
    assert (await booked(gateway, stream.response.headers["x-request-id"]))[1] == 4


async def test_completions_of_several_prompts(gateway, openai):
    asked = {"model": MODEL, "prompt": ["Hello there", "and once more"], "max_tokens": 4}
    answer = await openai.completions.create(**asked)
    assert len(answer.choices) == 2
    assert await booked(gateway, answer._request_id) == told(answer.usage)
    stream = await openai.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.completion_tokens == 8
    assert await booked(gateway, stream.response.headers["x-request-id"]) == told(chunks[-1].usage)


async def test_embeddings_are_the_same_numbers_in_both_encodings(gateway, openai):
    """Without a word about it the SDK asks for base64 and decodes that."""
    asked = {"model": MODEL, "input": ["one text", "and another"]}
    usual = await openai.embeddings.create(**asked)
    plain = await openai.embeddings.create(**asked, encoding_format="float")
    for ours, theirs in zip(usual.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, abs=1e-6)
        assert len(ours.embedding) == 32
    assert usual.usage.prompt_tokens == 5
    assert await booked(gateway, usual._request_id) == (5, 0, 0)


async def test_responses(gateway, openai):
    asked = {"model": MODEL, "input": "Hello there", "max_output_tokens": 6}
    answer = await openai.responses.create(**asked)
    assert len(answer.output_text.split()) == 6
    used = (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens)
    assert await booked(gateway, answer._request_id) == used
    stream = await openai.responses.create(**asked, stream=True)
    events = [event async for event in stream]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert events[-1].response.usage.output_tokens == 6
    assert (await booked(gateway, stream.response.headers["x-request-id"]))[:2] == used[:2]


async def test_models_are_those_of_the_token(openai):
    assert [model.id async for model in openai.models.list()] == [MODEL, "off", "dead"]
    assert (await openai.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(sdk.NotFoundError):
        await openai.models.retrieve("secluded-no-more")


async def test_many_at_once_are_each_booked(gateway, openai):
    async def one(number: int) -> None:
        asked = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Number {number}"}],
            "max_tokens": number % 7 + 1,
        }
        if number % 2:
            answer = await openai.chat.completions.create(**asked)
            assert await booked(gateway, answer._request_id) == told(answer.usage)
        else:
            stream = await openai.chat.completions.create(**asked, stream=True)
            assert len((await text_of(stream)).split()) == number % 7 + 1
            assert (await booked(gateway, stream.response.headers["x-request-id"]))[1] == number % 7 + 1

    await asyncio.gather(*(one(number) for number in range(60)))


def test_the_client_that_is_not_async(gateway):
    with OpenAI(base_url=gateway.url + "/v1", api_key="sk-good", max_retries=0, timeout=TIMEOUT_S) as client:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 3}
        plain = client.chat.completions.create(**asked)
        with client.chat.completions.create(**asked, stream=True) as stream:
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == plain.choices[0].message.content


async def test_an_engine_that_compresses_all_the_same(gateway, openai):
    """The SDK accepts gzip, the gateway asks the engine for none; one that does not listen is understood."""
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, "extra_headers": {"x-sim-fault": "gzip"}}
    raw = await openai.chat.completions.with_raw_response.create(**asked)
    assert "gzip" in raw.http_request.headers["accept-encoding"]
    assert raw.headers["content-encoding"] == "gzip"
    assert raw.parse().usage.completion_tokens == 5
    stream = await openai.chat.completions.create(**asked, stream=True)
    assert len((await text_of(stream)).split()) == 5
    assert (await booked(gateway, stream.response.headers["x-request-id"]))[1] == 5
