"""What breaks off, from either side: which exception an SDK raises, and what the ledger says."""

import anthropic as anthropic_sdk
import httpx2
import openai as openai_sdk
import pytest

from tests.clients.conftest import MESSAGES, MODEL

ASKED = {"model": MODEL, "messages": MESSAGES}


def faulty(fault: str) -> dict[str, str]:
    return {"x-sim-fault": fault}


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
    openai, anthropic = await clients.openai(timeout=0.3), await clients.anthropic(timeout=0.3)
    rows = gateway.count()
    with pytest.raises(openai_sdk.APITimeoutError):
        await openai.chat.completions.create(**ASKED, extra_headers=faulty("first_byte_delay_ms=60000"))
    with pytest.raises(anthropic_sdk.APITimeoutError):
        await anthropic.messages.create(**ASKED, max_tokens=5, extra_headers=faulty("first_byte_delay_ms=60000"))
    left = (await gateway.rows(rows + 2))[-2:]
    assert [row["error"] for row in left] == ["client_disconnected"] * 2


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
    lost = faulty(f"reset_after_chunks={after}")
    chunks = await openai.chat.completions.create(**ASKED, stream=True, extra_headers=lost)
    with pytest.raises(openai_sdk.APIConnectionError):
        async for _ in chunks:
            pass
    events = await anthropic.messages.create(**ASKED, max_tokens=5, stream=True, extra_headers=lost)
    with pytest.raises(httpx2.RemoteProtocolError):  # this SDK does not translate it
        async for _ in events:
            pass
    for stream in (chunks, events):
        row = await gateway.row_of(stream.response.headers["x-request-id"])
        assert (row["error"], row["status"]) == ("engine_lost", 502)


async def test_an_engine_lost_inside_a_plain_answer(openai, anthropic):
    lost = faulty("reset_after_chunks=3")
    with pytest.raises(openai_sdk.APIConnectionError):
        await openai.chat.completions.create(**ASKED, extra_headers=lost)
    with pytest.raises(anthropic_sdk.APIConnectionError):
        await anthropic.messages.create(**ASKED, max_tokens=5, extra_headers=lost)
