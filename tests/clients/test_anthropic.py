"""Anthropic's SDK gets what it asks for, and the ledger has what it was told, to the token."""

import asyncio

import pytest
from anthropic import Anthropic, RateLimitError

from tests.clients.conftest import MESSAGES, MODEL, TIMEOUT_S, booked

ASKED = {"model": MODEL, "max_tokens": 6, "messages": MESSAGES}


def told(usage) -> tuple[int, int, int]:
    """A usage object in the ledger's order: Anthropic's input excludes what the cache gave and took."""
    cached = usage.cache_read_input_tokens or 0
    return usage.input_tokens + (usage.cache_creation_input_tokens or 0) + cached, usage.output_tokens, cached


async def test_a_message(gateway, anthropic):
    message = await anthropic.messages.create(**ASKED)
    assert len(message.content[0].text.split()) == 6
    assert message.stop_reason == "max_tokens"
    assert await booked(gateway, message._request_id) == told(message.usage)


async def test_a_message_in_blocks_with_a_system_prompt(gateway, anthropic):
    system = [{"type": "text", "text": "Be brief. " * 60, "cache_control": {"type": "ephemeral"}}]
    asked = {**ASKED, "system": system, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    first = await anthropic.messages.create(**asked)
    again = await anthropic.messages.create(**asked)
    assert first.usage.cache_creation_input_tokens > 0
    assert again.usage.cache_read_input_tokens > 0
    assert told(first.usage)[:2] == told(again.usage)[:2]
    assert await booked(gateway, first._request_id) == told(first.usage)
    assert await booked(gateway, again._request_id) == told(again.usage)


async def test_a_streamed_message_says_what_the_plain_one_says(gateway, anthropic):
    plain = await anthropic.messages.create(**ASKED)
    stream = await anthropic.messages.create(**ASKED, stream=True)
    events = [event async for event in stream]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == plain.content[0].text
    assert events[-1].type == "message_stop"
    assert (await booked(gateway, stream.response.headers["request-id"]))[:2] == told(plain.usage)[:2]


async def test_the_streaming_helper_puts_the_message_together(gateway, anthropic):
    async with anthropic.messages.stream(**ASKED) as stream:
        said = "".join([text async for text in stream.text_stream])
        message = await stream.get_final_message()
    assert message.content[0].text == said
    assert stream.request_id == stream.response.headers["x-request-id"]
    assert await booked(gateway, stream.request_id) == told(message.usage)


async def test_a_tool_is_used(gateway, anthropic):
    tools = [{"name": "look", "input_schema": {"type": "object", "properties": {}}}]
    asked = {**ASKED, "tools": tools, "tool_choice": {"type": "any"}}
    message = await anthropic.messages.create(**asked)
    assert message.content[0].name == "look"
    assert await booked(gateway, message._request_id) == told(message.usage)
    async with anthropic.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert streamed.content[0].input == message.content[0].input
    assert await booked(gateway, stream.request_id) == told(streamed.usage)


async def test_counting_tokens_is_a_request_that_uses_none(gateway, anthropic):
    counted = await anthropic.messages.count_tokens(model=MODEL, messages=MESSAGES)
    message = await anthropic.messages.create(**ASKED)
    assert counted.input_tokens == told(message.usage)[0]
    assert await booked(gateway, counted._request_id) == (0, 0, 0)
    row = await gateway.row_of(counted._request_id)
    assert (row["model"], row["token"]) == (MODEL, "good")


async def test_counting_tokens_is_limited_as_a_request(clients):
    asked = {"model": MODEL, "messages": MESSAGES}
    of_tokens, of_requests = await clients.anthropic("sk-spent"), await clients.anthropic("sk-a-day")
    assert (await of_tokens.messages.count_tokens(**asked)).input_tokens > 10, "more than is left of the quota"
    with pytest.raises(RateLimitError) as caught:
        await of_requests.messages.count_tokens(**asked)
    assert caught.value.error_code == "rate_limit_exceeded"


async def test_a_bearer_token_is_as_good_as_an_api_key(gateway, clients):
    client = await clients.anthropic(api_key=None, auth_token="sk-good")
    message = await client.messages.create(**ASKED)
    assert await booked(gateway, message._request_id) == told(message.usage)


async def test_models_are_those_of_the_token(anthropic):
    assert [model.id async for model in anthropic.models.list()] == [MODEL, "off", "dead"]
    assert (await anthropic.models.retrieve(MODEL)).id == MODEL


async def test_many_at_once_are_each_booked(gateway, anthropic):
    async def one(number: int) -> None:
        messages = [{"role": "user", "content": f"Number {number}"}]
        asked = {"model": MODEL, "messages": messages, "max_tokens": number % 7 + 1}
        if number % 2:
            message = await anthropic.messages.create(**asked)
            assert await booked(gateway, message._request_id) == told(message.usage)
        else:
            async with anthropic.messages.stream(**asked) as stream:
                message = await stream.get_final_message()
            assert await booked(gateway, stream.request_id) == told(message.usage)

    await asyncio.gather(*(one(number) for number in range(40)))


def test_the_client_that_is_not_async(gateway):
    with Anthropic(base_url=gateway.url, api_key="sk-good", max_retries=0, timeout=TIMEOUT_S) as client:
        plain = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            assert stream.get_final_text() == plain.content[0].text


@pytest.mark.parametrize("beta", ["prompt-caching-2024-07-31"])
async def test_a_beta_of_theirs_is_passed_on(gateway, anthropic, beta):
    message = await anthropic.beta.messages.create(**ASKED, betas=[beta])
    assert await booked(gateway, message._request_id) == told(message.usage)
