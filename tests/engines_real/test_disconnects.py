"""A client that leaves: the engine stops, the row says 499 and estimates what vLLM's counters say exactly."""

import asyncio
import json
import time

import pytest

from tests.engines_real.books import Books
from tests.engines_real.client import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Client, body_for

ASKED = 3000
STOPS_WITHIN_S = 1.0
"""the engine itself needs a step or two; this also covers a machine under load"""
QUESTION = "A quick brown fox asks the model a question. " * 4


async def text_of(events):
    """The texts of any API's stream, as they come."""
    async for data in events:
        if data == "[DONE]":
            return
        event = json.loads(data)
        if event.get("choices"):
            choice = event["choices"][0]
            text = choice.get("text") or choice.get("delta", {}).get("content")
        else:
            delta = event.get("delta")
            text = delta.get("text") if isinstance(delta, dict) else delta
        if text:
            yield text


async def leave_after(chunks: int, client: Client, path: str, body) -> str:
    async with client.stream(path, body) as (request_id, events):
        seen = 0
        async for _ in text_of(events):
            seen += 1
            if seen == chunks:
                break
    return request_id


async def busy(books: Books, session) -> None:
    deadline = time.monotonic() + 10
    while not await books.engine.busy(session):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def idle_after_s(books: Books, session) -> float:
    start = time.monotonic()
    while await books.engine.busy(session):
        assert time.monotonic() - start < 10
        await asyncio.sleep(0.02)
    return time.monotonic() - start


@pytest.mark.parametrize("chunks", [1, 5, 120])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_left_at_chunk(path, chunks, client: Client, gateway, books: Books, session, record_property):
    # The endpoint's ratio of tokens to bytes is learned from answers; give it one of this kind.
    for _ in range(3):
        await client.ok(path, body_for(path, QUESTION, 2))
    await books.open(session)
    request_id = await leave_after(chunks, client, path, body_for(path, QUESTION, ASKED, stream=True))
    stopped_s = await idle_after_s(books, session)
    row = await gateway.row_of(request_id)
    page = await books.page(session)
    real = page.unexplained
    told = (
        f"prompt {row['prompt_tokens']} for {real.prompt}, completion {row['completion_tokens']} for {real.generation}"
    )
    record_property("estimate", told)
    print(f"{path} left at {chunks}: {told}; idle after {stopped_s:.2f} s")
    assert stopped_s < STOPS_WITHIN_S
    assert real.generation < ASKED
    assert (row["status"], row["accuracy"], row["error"]) == (499, "estimated", "client_disconnected")
    # What was delivered was generated; what was generated and not delivered is what was under way.
    assert chunks <= row["completion_tokens"] <= real.generation
    assert real.generation - row["completion_tokens"] <= 40 + 0.4 * real.generation
    assert 0.5 * real.prompt <= row["prompt_tokens"] <= 2 * real.prompt


async def test_running_usage_makes_the_prompt_exact(client: Client, gateway, books: Books, session):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = body_for(CHAT, QUESTION, ASKED, stream=True, stream_options=options)
    request_id = await leave_after(20, client, CHAT, body)
    row = await gateway.row_of(request_id)
    real = (await books.page(session)).unexplained
    assert row["prompt_tokens"] == real.prompt
    assert 20 <= row["completion_tokens"] <= real.generation


async def test_messages_stream_makes_the_prompt_exact(client: Client, gateway, books: Books, session):
    """message_start says it."""
    request_id = await leave_after(3, client, MESSAGES, body_for(MESSAGES, QUESTION, ASKED, stream=True))
    row = await gateway.row_of(request_id)
    assert row["prompt_tokens"] == (await books.page(session)).unexplained.prompt


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_left_before_a_plain_answer(path, client: Client, gateway, books: Books, session):
    """Nothing was delivered, so nothing of the answer is charged; the engine stops all the same."""
    asking = asyncio.create_task(client.ask(path, body_for(path, QUESTION, ASKED)))
    await busy(books, session)
    asking.cancel()
    assert await idle_after_s(books, session) < STOPS_WITHIN_S
    page = await books.page(session)
    (row,) = page.estimated
    assert (row["status"], row["error"], row["completion_tokens"]) == (499, "client_disconnected", 0)
    assert 0.5 * page.unexplained.prompt <= row["prompt_tokens"] <= 2 * page.unexplained.prompt
    assert page.unexplained.generation < ASKED


async def test_leavers_among_others_disturb_nobody(client: Client, gateway, books: Books, session):
    """Streams that go on while others break off are charged to the token."""
    stay = [client.ok(CHAT, body_for(CHAT, f"{n} {QUESTION}", 150, stream=True)) for n in range(6)]
    leave = [leave_after(3 + n, client, CHAT, body_for(CHAT, f"{n} {QUESTION}", ASKED, stream=True)) for n in range(6)]
    answers, _ = await asyncio.gather(asyncio.gather(*stay), asyncio.gather(*leave))
    for answer in answers:
        row = await gateway.row_of(answer.request_id)
        assert (row["accuracy"], row["completion_tokens"]) == ("exact", 150)
    page = await books.page(session)
    assert (len(page.exact), len(page.estimated)) == (6, 6)
