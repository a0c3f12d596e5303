"""Every way to have vLLM generate, through the gateway: clients see the engine's words, the ledger has its count."""

import asyncio

import pytest

from tests.engines_real.client import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Client, body_for, chat
from tests.harness.gateway import Gateway

PATHS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
LONG = "The gateway counts every token that an engine reads and writes. " * 12


def read_usage(usage):
    """(prompt, completion) in any API's shape."""
    if "prompt_tokens" in usage:
        return usage["prompt_tokens"], usage["completion_tokens"]
    cache = usage.get("cache_read_input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)
    return usage["input_tokens"] + cache, usage["output_tokens"]


async def row_of(gateway: Gateway, answer):
    row = await gateway.row_of(answer.request_id)
    assert (row["status"], row["accuracy"], row["error"]) == (200, "exact", "")
    return row


@pytest.mark.parametrize("path", PATHS)
async def test_plain_answer(path, client: Client, gateway, balanced):
    answer = await client.ok(path, body_for(path, "Hello there!", 9))
    row = await row_of(gateway, answer)
    assert (row["prompt_tokens"], row["completion_tokens"]) == read_usage(answer.json["usage"])
    assert row["completion_tokens"] == 9
    assert (row["token"], row["model"], row["stream"]) == ("alice", "tiny-chat", False)


@pytest.mark.parametrize("path", PATHS)
async def test_streamed_answer(path, client: Client, gateway, balanced):
    answer = await client.ok(path, body_for(path, "Hello there!", 40, stream=True))
    row = await row_of(gateway, answer)
    assert row["completion_tokens"] == 40
    assert row["stream"]
    assert 0 < row["ttft_ms"] <= row["duration_ms"]
    if path in {CHAT, COMPLETIONS}:
        assert answer.data[-1] == "[DONE]"
        assert all(event["choices"] and not event.get("usage") for event in answer.events)
    elif path == RESPONSES:
        assert (row["prompt_tokens"], 40) == read_usage(answer.events[-1]["response"]["usage"])
    else:
        told = next(event for event in answer.events if event["type"] == "message_delta")
        assert (row["prompt_tokens"], 40) == read_usage(told["usage"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_event_reaches_a_client_that_asked(path, client: Client, gateway, balanced):
    body = body_for(path, "Hello there!", 12, stream=True, stream_options={"include_usage": True})
    answer = await client.ok(path, body)
    row = await row_of(gateway, answer)
    assert answer.events[-1]["choices"] == []
    assert read_usage(answer.events[-1]["usage"]) == (row["prompt_tokens"], row["completion_tokens"])
    assert all(not event.get("usage") for event in answer.events[:-1])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_running_usage_is_not_added_up(path, client: Client, gateway, balanced):
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await client.ok(path, body_for(path, "Hello there!", 12, stream=True, stream_options=options))
    row = await row_of(gateway, answer)
    told = [read_usage(event["usage"])[1] for event in answer.events]
    assert told == sorted(told)
    assert len(told) > 3
    assert told[-1] == row["completion_tokens"] == 12


async def test_running_usage_alone_still_hides_the_usage_event(client: Client, gateway, balanced):
    """vLLM ignores continuous_usage_stats without include_usage, other engines may not: it stays as it came."""
    body = chat(max_tokens=8, ignore_eos=True, stream=True, stream_options={"continuous_usage_stats": True})
    answer = await client.ok(CHAT, body)
    await row_of(gateway, answer)
    assert all(event["choices"] for event in answer.events)


async def test_stream_is_the_engines_own_but_for_the_usage_event(engine, client: Client, session, books):
    """Every other byte is the engine's: compared with an answer that it gave directly."""
    body = chat(max_tokens=30, ignore_eos=True, temperature=0, stream=True)
    asked = {**body, "stream_options": {"include_usage": True}}
    direct = await Client(session, engine.url).ok(CHAT, asked)
    through = await client.ok(CHAT, body)
    known = {event["id"]: event["created"] for event in (direct.events[0], through.events[0])}

    def neutral(answer):
        text = answer.text
        for number, created in known.items():
            text = text.replace(number, "ID").replace(f'"created":{created}', '"created":0')
        return text.split("\n\n")

    expected = [event for event in neutral(direct) if '"choices":[]' not in event]
    # Engines put several tokens into one event when they are busy: same events, or at least the same text.
    if len(neutral(through)) == len(expected):
        assert neutral(through) == expected
    assert content(through) == content(direct)
    page = await books.page(session)
    assert page.unexplained.generation == 30


def content(answer):
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in answer.events if one["choices"])


async def test_list_of_prompts_with_choices(client: Client, gateway, balanced):
    prompts = ["Hello", "A quick brown fox", "0123456789"]
    answer = await client.ok(
        COMPLETIONS, {"model": "tiny-chat", "prompt": prompts, "max_tokens": 5, "n": 2, "ignore_eos": True}
    )
    row = await row_of(gateway, answer)
    assert len(answer.json["choices"]) == 6
    assert row["completion_tokens"] == 30
    balanced.again += row["prompt_tokens"]


@pytest.mark.parametrize("asks", [False, True])
async def test_streamed_choices(asks, client: Client, gateway, balanced):
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} if asks else {}
    answer = await client.ok(CHAT, chat(max_tokens=20, n=3, ignore_eos=True, stream=True, **options))
    row = await row_of(gateway, answer)
    assert row["completion_tokens"] == 60
    balanced.again += 2 * row["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_cached_tokens_are_part_of_the_prompt(path, stream, client: Client, gateway, balanced, session):
    body = body_for(path, f"{path} {stream} {LONG}", 4, stream=stream)
    first = await row_of(gateway, await client.ok(path, body))
    again = await row_of(gateway, await client.ok(path, body))
    assert again["prompt_tokens"] == first["prompt_tokens"] > 150
    assert first["cached_tokens"] < again["cached_tokens"] < again["prompt_tokens"]
    page = await balanced.page(session)
    assert page.unexplained.cached == 0


async def test_logprobs_in_a_stream(client: Client, gateway, balanced):
    answer = await client.ok(CHAT, chat(max_tokens=25, ignore_eos=True, stream=True, logprobs=True, top_logprobs=3))
    row = await row_of(gateway, answer)
    told = sum(len(event["choices"][0]["logprobs"]["content"]) for event in answer.events if logprobs(event))
    assert told == row["completion_tokens"] == 25


def logprobs(event):
    return (event["choices"][0].get("logprobs") or {}).get("content")


async def test_unknown_fields_and_aliases_reach_the_engine(client: Client, gateway, balanced):
    answer = await client.ok(CHAT, chat(max_tokens=3, never_heard_of={"a": [1]}) | {"model": "tiny-alias"})
    row = await row_of(gateway, answer)
    assert row["model"] == row["endpoint"] == "tiny-alias"
    # The engine's first name: its answer is not rewritten.
    assert answer.json["model"] == "tiny-chat"


async def test_engines_own_fields_answer(client: Client, gateway, balanced):
    """Fields of the engine that steer nothing inside it are the client's to use."""
    answer = await client.ok(CHAT, chat(max_tokens=6, ignore_eos=True, return_token_ids=True, min_p=0.1))
    assert len(answer.json["choices"][0]["token_ids"]) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_overlong_prompt_is_refused_in_the_engines_words(path, stream, client: Client, gateway, books, session):
    answer = await client.ask(path, body_for(path, LONG * 40, 5, stream=stream))
    assert answer.status == 400
    assert "4096" in answer.text
    row = await gateway.row_of(answer.request_id)
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == (400, 0, 0)
    assert row["error"] == "engine_refused"
    page = await books.page(session)
    assert page.unexplained.prompt == page.unexplained.generation == 0


async def test_answer_longer_than_the_room_is_cut_and_charged_as_cut(client: Client, gateway, balanced):
    body = chat(LONG * 9, ignore_eos=True, stream=True, max_tokens=4000)
    answer = await client.ok(CHAT, body)
    row = await row_of(gateway, answer)
    assert row["prompt_tokens"] + row["completion_tokens"] == 4096


async def test_many_at_once(client: Client, gateway, balanced):
    """Mixed APIs, streamed and plain: no request's tokens land in another's row."""
    asked = [
        (path, body_for(path, f"{number}: {LONG[: 10 * number]}", 5 + number, stream=number % 3 > 0))
        for number, path in enumerate(PATHS * 6)
    ]
    answers = await asyncio.gather(*(client.ok(path, body) for path, body in asked))
    for number, answer in enumerate(answers):
        row = await row_of(gateway, answer)
        assert row["completion_tokens"] == 5 + number
