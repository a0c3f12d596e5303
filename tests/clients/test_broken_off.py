"""What breaks off, from either side: which exception an SDK raises, and what the ledger says."""

import asyncio
import uuid

import anthropic as anthropic_sdk
import httpx2
import openai as openai_sdk
import pytest

from tests.clients.conftest import MESSAGES, MODEL

ASKED = {"model": MODEL, "messages": MESSAGES}


def faulty(fault: str) -> dict[str, str]:
    return {"x-sim-fault": fault}


def held(request_id: str) -> dict[str, str]:
    return {"x-request-id": request_id, "x-sim-fault": "hold"}


async def test_a_stream_closed_early_is_charged_for_what_went_out(gateway, openai, anthropic):
    chunks = await openai.chat.completions.create(**ASKED, max_tokens=100_000, stream=True)
    for _ in range(4):
        await anext(chunks)
    await chunks.close()
    events = await anthropic.messages.create(**ASKED, max_tokens=100_000, stream=True)
    for _ in range(5):
        await anext(events)
    await events.close()
    for stream in (chunks, events):
        row = await gateway.row_of(stream.response.headers["x-request-id"])
        assert (row["error"], row["status"]) == ("client_disconnected", 499)
        assert 3 <= row["completion_tokens"] < 100_000


async def test_a_client_that_waits_no_longer(gateway, clients):
    # Long enough for the request to have been admitted before, on a busy machine too.
    openai, anthropic = await clients.openai(timeout=4.0), await clients.anthropic(timeout=4.0)
    ids = [str(uuid.uuid4()) for _ in range(2)]

    async def by_openai() -> None:
        with pytest.raises(openai_sdk.APITimeoutError):
            await openai.chat.completions.create(**ASKED, extra_headers=held(ids[0]))

    async def by_anthropic() -> None:
        with pytest.raises(anthropic_sdk.APITimeoutError):
            await anthropic.messages.create(**ASKED, max_tokens=5, extra_headers=held(ids[1]))

    await asyncio.gather(by_openai(), by_anthropic())
    assert [(await gateway.row_of(one))["error"] for one in ids] == ["client_disconnected"] * 2


@pytest.mark.parametrize("fault", ["status=500", "status=503", "queue_full"])
async def test_an_engines_own_failure(clients, fault):
    openai, anthropic = await clients.openai(), await clients.anthropic()
    with pytest.raises(openai_sdk.InternalServerError) as caught:
        await openai.chat.completions.create(**ASKED, extra_headers=faulty(fault))
    assert caught.value.request_id
    with pytest.raises(anthropic_sdk.InternalServerError) as failed:
        await anthropic.messages.create(**ASKED, max_tokens=5, extra_headers=faulty(fault))
    assert failed.value.request_id
    assert failed.value.type


async def test_an_error_inside_a_stream(gateway, openai, anthropic):
    chunks = await openai.chat.completions.create(**ASKED, stream=True, extra_headers=faulty("error_after_chunks=3"))
    with pytest.raises(openai_sdk.APIError, match="Internal server error"):
        async for _ in chunks:
            pass
    events = await anthropic.messages.create(
        **ASKED, max_tokens=5, stream=True, extra_headers=faulty("error_after_chunks=3")
    )
    with pytest.raises(anthropic_sdk.APIStatusError, match="Internal server error") as caught:
        async for _ in events:
            pass
    assert caught.value.request_id == events.response.headers["x-request-id"]
    for stream in (chunks, events):
        row = await gateway.row_of(stream.response.headers["x-request-id"])
        assert row["error"] == "engine_error"


@pytest.mark.parametrize("after", [0, 3])
async def test_an_engine_lost_inside_a_stream_is_no_ordinary_end(gateway, openai, anthropic, after):
    ids = [str(uuid.uuid4()) for _ in range(2)]
    headers = [{"x-request-id": one, **faulty(f"reset_after_chunks={after}")} for one in ids]
    with pytest.raises((openai_sdk.APIConnectionError, openai_sdk.InternalServerError)) as caught:
        async for _ in await openai.chat.completions.create(**ASKED, stream=True, extra_headers=headers[0]):
            pass
    assert_broken(caught.value)
    # This SDK does not translate what breaks inside a stream.
    with pytest.raises((httpx2.RemoteProtocolError, anthropic_sdk.InternalServerError)) as failed:
        async for _ in await anthropic.messages.create(**ASKED, max_tokens=5, stream=True, extra_headers=headers[1]):
            pass
    assert_broken(failed.value)
    for one in ids:
        row = await gateway.row_of(one)
        assert (row["error"], row["status"]) == ("engine_lost", 502)


def assert_broken(error: Exception) -> None:
    """Where Envoy heard of the loss before it had sent anything, it could say so."""
    if isinstance(error, openai_sdk.APIStatusError | anthropic_sdk.APIStatusError):
        assert error.status_code == 502
        assert "engine_broken" in error.response.text


async def test_an_engine_lost_inside_a_plain_answer(openai, anthropic):
    lost = faulty("reset_after_chunks=3")
    with pytest.raises((openai_sdk.APIConnectionError, openai_sdk.InternalServerError)) as caught:
        await openai.chat.completions.create(**ASKED, extra_headers=lost)
    assert_broken(caught.value)
    with pytest.raises((anthropic_sdk.APIConnectionError, anthropic_sdk.InternalServerError)) as failed:
        await anthropic.messages.create(**ASKED, max_tokens=5, extra_headers=lost)
    assert_broken(failed.value)
