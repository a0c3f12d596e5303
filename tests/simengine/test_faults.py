"""Each fault does what it says, is counted by what was delivered, and ends when it is switched off."""

import asyncio
import gzip
import json
import zlib

import pytest

from simengine.faults import Faults, overlay, parse_faults
from tests.simengine.raw import CHAT, Engine, chat, payload, serving
from tests.simengine.test_accounting import GENERATED, until_idle


async def set_faults(engine: Engine, **faults: object) -> None:
    assert (await engine.post("/sim/faults", faults))[0] == 200


def undated(event: bytes) -> object:
    return event if event == b"data: [DONE]" else {**payload(event), "created": 0}


@pytest.mark.parametrize("itl_ms", [0, 2])
@pytest.mark.parametrize("chunks", [0, 1, 4, 8])
async def test_a_reset_comes_after_exactly_so_many_chunks(chunks, itl_ms):
    async with serving(itl_ms=itl_ms, faults=Faults(reset_after_chunks=chunks)) as engine:
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True, max_tokens=8))
            assert (await raw.head())[0] == 200
            for _ in range(chunks + bool(chunks)):
                await raw.chunk()
            with pytest.raises(ConnectionResetError):
                assert await raw.rest() == b""
        metrics = await until_idle(engine)
        assert metrics[GENERATED] == chunks
        assert metrics["vllm:request_success_total"] == 0


async def test_a_plain_answer_is_reset_in_its_middle():
    async with serving(faults=Faults(reset_after_chunks=1)) as engine, engine.connect() as raw:
        raw.post(CHAT, chat())
        _, headers = await raw.head()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await raw.reader.readexactly(int(headers["content-length"]))


async def test_a_stalled_stream_stays_open_until_the_client_leaves():
    async with serving(faults=Faults(stall_after_chunks=2)) as engine:
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True))
            await raw.head()
            for _ in range(3):
                await raw.chunk()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(raw.reader.read(1), 0.1)
            assert (await engine.metrics())["vllm:num_requests_running"] == 1
        assert (await until_idle(engine))[GENERATED] == 2


async def test_an_error_event_is_followed_by_done():
    async with serving(faults=Faults(error_after_chunks=2)) as engine:
        events = await engine.stream(CHAT, chat())
        assert payload(events[-2])["error"]["code"] == 500
        assert events[-1] == b"data: [DONE]"
        assert len(events) == 1 + 2 + 2
        await engine.json(CHAT, chat(), status=500)
        assert (await engine.metrics())['vllm:request_success_total{finished_reason="error"}'] == 2


async def test_messages_fail_in_anthropics_form():
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    async with serving(faults=Faults(error_after_chunks=2)) as engine:
        events = await engine.stream("/v1/messages", body)
        assert events[-1].startswith(b"event: error\n")
        assert payload(events[-1])["type"] == "error"
        assert len(events) == 2 + 2 + 1, "and no [DONE]"
        assert (await engine.json("/v1/messages", body, status=500))["type"] == "error"
        await set_faults(engine, queue_full=True)
        assert (await engine.json("/v1/messages", body, status=503))["type"] == "error"


async def test_a_fault_beyond_the_answers_end_does_not_happen():
    async with serving(faults=Faults(reset_after_chunks=99)) as engine:
        assert (await engine.stream(CHAT, chat()))[-1] == b"data: [DONE]"


@pytest.mark.parametrize("faults", [{"cut_every_bytes": 1}, {"cut_every_bytes": 7}, {"cut_at": [5, 6, 300]}])
async def test_cut_bodies_are_whole_in_sum(faults):
    async with serving() as engine:
        ids = "x-request-id: R"
        plain = await engine.json(CHAT, chat(), ids)
        whole = await engine.stream(CHAT, chat(), ids)
        await set_faults(engine, **faults)
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True), ids)
            await raw.head()
            pieces = await raw.chunks()
        limit = faults.get("cut_every_bytes")
        if limit:
            assert max(map(len, pieces)) <= limit
        else:
            ends = [sum(map(len, pieces[: count + 1])) for count in range(len(pieces))]
            assert {5, 6, 300} <= set(ends)
        again = b"".join(pieces)[:-2].split(b"\n\n")
        assert [undated(event) for event in again] == [undated(event) for event in whole]
        assert (await engine.json(CHAT, chat(), ids))["choices"] == plain["choices"]


async def test_gzip_can_be_read_as_it_comes():
    async with serving(faults=Faults(gzip=True)) as engine:
        _, headers, body = await engine.post(CHAT, chat())
        assert headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(body))["usage"]["completion_tokens"] == 16
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True, max_tokens=2))
            _, headers = await raw.head()
            assert headers["content-encoding"] == "gzip"
            reader = zlib.decompressobj(wbits=31)
            first = reader.decompress(await raw.chunk())
            assert first.endswith(b"\n\n"), "every event can be read when it arrives"
            rest = b"".join([reader.decompress(chunk) for chunk in await raw.chunks()])
            assert rest.endswith(b"data: [DONE]\n\n")
            assert reader.eof


async def test_crlf_and_comments():
    async with serving(faults=Faults(crlf=True, comments=True)) as engine:
        _, _, body = await engine.post(CHAT, chat(stream=True))
        assert body.startswith(b": keep-alive\r\n\r\ndata: {")
        assert body.replace(b"\r\n", b"").count(b"\n") == 0
        assert body.endswith(b"data: [DONE]\r\n\r\n")


async def test_usage_can_be_missing_everywhere():
    async with serving(faults=Faults(no_usage=True)) as engine:
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        assert "usage" not in await engine.json(CHAT, chat())
        for path, body in (
            (CHAT, chat(**options)),
            ("/v1/messages", {"messages": [{"content": "x"}], "max_tokens": 2}),
        ):
            events = await engine.stream(path, body)
            assert not any(b'"usage"' in event for event in events)
        await set_faults(engine)
        assert "usage" in await engine.json(CHAT, chat())


@pytest.mark.parametrize("delta", [-10, 10])
async def test_a_wrong_content_length(delta):
    async with serving(faults=Faults(content_length_delta=delta)) as engine, engine.connect() as raw:
        raw.post(CHAT, chat())
        _, headers = await raw.head()
        body = await raw.rest()
        assert len(body) + delta == int(headers["content-length"])


async def test_refusals():
    async with serving() as engine:
        await set_faults(engine, status=502)
        assert (await engine.json(CHAT, chat(), status=502))["error"]["code"] == 502
        await set_faults(engine, queue_full=True)
        assert (await engine.json(CHAT, chat(stream=True), status=503))["error"]["type"] == "Service Unavailable"
        await set_faults(engine, close=True)
        async with engine.connect() as raw:
            raw.post(CHAT, chat())
            assert await raw.rest() == b""
        await set_faults(engine, health_status=500)
        async with engine.connect() as raw:
            raw.get("/health")
            assert (await raw.answer())[0] == 500
        await set_faults(engine)
        assert await engine.get("/health") == b""


async def test_a_slow_first_byte_withholds_the_headers():
    async with serving(faults=Faults(first_byte_delay_ms=80)) as engine:
        loop = asyncio.get_running_loop()
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True))
            began_s = loop.time()
            await raw.head()
            assert loop.time() - began_s >= 0.07
        async with engine.connect() as raw:
            raw.post(CHAT, chat(stream=True))
        await asyncio.sleep(0.12)
        assert (await until_idle(engine))["vllm:request_success_total"] <= 1, "the one that left was never begun"


async def test_a_fault_for_the_first_requests_only():
    async with serving() as engine:
        await set_faults(engine, status=500, times=2)
        statuses = [(await engine.post(CHAT, chat()))[0] for _ in range(4)]
        assert statuses == [500, 500, 200, 200]


async def test_the_header_works_only_where_it_is_allowed():
    async with serving(allow_fault_headers=True) as engine:
        assert (await engine.post(CHAT, chat(), "x-sim-fault: status=418"))[0] == 418
        assert (await engine.post(CHAT, chat(), "x-sim-fault: nonsense=1"))[0] == 400
        assert (await engine.post(CHAT, chat()))[0] == 200
    async with serving() as engine:
        assert (await engine.post(CHAT, chat(), "x-sim-fault: status=418"))[0] == 200


async def test_unknown_faults_are_named():
    async with serving() as engine:
        status, _, body = await engine.post("/sim/faults", {"nonsense": 1})
        assert status == 400
        assert b"nonsense" in body
    with pytest.raises(ValueError, match="status"):
        parse_faults("status=abc")


def test_text_form_and_overlay():
    faults = parse_faults("gzip, cut_at=5:10,reset_after_chunks=0")
    assert faults == Faults(gzip=True, cut_at=(5, 10), reset_after_chunks=0)
    assert overlay(faults, Faults(status=500)) == Faults(gzip=True, cut_at=(5, 10), reset_after_chunks=0, status=500)


async def test_who_is_held_goes_on_when_the_faults_are_set_again():
    async with serving(allow_fault_headers=True) as engine, engine.connect() as held, engine.connect() as left:
        for raw in (held, left):
            raw.post(CHAT, chat(max_tokens=2), "x-sim-fault: hold")
        # Those that come after it are served.
        await engine.json(CHAT, chat())
        assert (await engine.metrics())["vllm:request_success_total"] == 1
        left.writer.close()
        await left.rest()
        await set_faults(engine)
        assert (await held.answer())[0] == 200
        assert (await until_idle(engine))["vllm:request_success_total"] == 2
