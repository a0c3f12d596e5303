"""OpenAI's and Anthropic's SDKs on a real engine: they understand what it can do, the ledger has its counts."""

from collections.abc import AsyncIterator
from typing import Literal

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel

MODEL = "tiny-chat"
MESSAGES = [{"role": "user", "content": "The gateway counts every token that an engine reads and writes. " * 12}]
TIMEOUT_S = 120.0


@pytest.fixture
async def openai(gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=gateway.url + "/v1", api_key="sk-alice", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


@pytest.fixture
async def anthropic(gateway) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=gateway.url, api_key="sk-alice", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


async def booked(gateway, request_id) -> tuple[int, int, int]:
    row = await gateway.row_of(request_id)
    assert (row["status"], row["accuracy"], row["error"]) == (200, "exact", "")
    return row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]


def openai_told(usage) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens


def anthropic_told(usage) -> tuple[int, int, int]:
    cached = usage.cache_read_input_tokens or 0
    return usage.input_tokens + (usage.cache_creation_input_tokens or 0) + cached, usage.output_tokens, cached


class Verdict(BaseModel):
    word: Literal["yes", "no"]


async def test_an_answer_of_a_given_shape(gateway, openai, balanced):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 100}
    answer = await openai.chat.completions.parse(**asked, response_format=Verdict)
    assert answer.choices[0].message.parsed.word in {"yes", "no"}
    assert await booked(gateway, answer._request_id) == openai_told(answer.usage)


async def test_log_probabilities(gateway, openai, balanced):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    answer = await openai.chat.completions.create(**asked)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    assert await booked(gateway, answer._request_id) == openai_told(answer.usage)
    async with openai.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = [event async for event in stream if event.type == "chunk"]
    usage = events[-1].chunk.usage
    assert await booked(gateway, events[-1].chunk.id.removeprefix("chatcmpl-")) == openai_told(usage)


async def test_responses(gateway, openai, balanced):
    answer = await openai.responses.create(model=MODEL, input="Hello there!", max_output_tokens=6)
    used = answer.usage
    assert await booked(gateway, answer._request_id) == (
        used.input_tokens,
        used.output_tokens,
        used.input_tokens_details.cached_tokens,
    )
    stream = await openai.responses.create(model=MODEL, input="Hello there!", max_output_tokens=6, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.completed"
    row = await booked(gateway, stream.response.headers["x-request-id"])
    assert row[:2] == (events[-1].response.usage.input_tokens, events[-1].response.usage.output_tokens)


async def test_messages(gateway, anthropic, balanced):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6}
    message = await anthropic.messages.create(**asked)
    assert await booked(gateway, message._request_id) == anthropic_told(message.usage)
    async with anthropic.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert await booked(gateway, stream.request_id) == anthropic_told(streamed.usage)


async def test_tokens_counted_are_those_of_the_message(gateway, anthropic, balanced):
    counted = await anthropic.messages.count_tokens(model=MODEL, messages=MESSAGES)
    message = await anthropic.messages.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert counted.input_tokens == anthropic_told(message.usage)[0]
    assert await booked(gateway, counted._request_id) == (0, 0, 0)
