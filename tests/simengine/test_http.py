"""HTTP/1.1 as a proxy speaks it: pipelining, chunked bodies, 100-continue, bounds, and what is not HTTP."""

import asyncio
import base64
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simengine.raw import CHAT, chat, serving


def request(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1".encode(), b"host: x", b"content-type: application/json", *headers]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])


async def test_pipelined_requests_are_answered_in_order():
    async with serving() as engine, engine.connect() as raw:
        for number in range(200):
            raw.post(CHAT, chat(max_tokens=2, stream=number % 3 == 0), f"x-request-id: r{number}")
        for number in range(200):
            status, _, body = await raw.answer()
            assert status == 200
            assert f'"id":"chatcmpl-r{number}"'.encode() in body


async def test_pipelined_requests_wait_for_a_slow_answer():
    async with serving(ttft_ms=20, record=100) as engine, engine.connect() as raw:
        for number in range(60):
            raw.post(CHAT, chat(max_tokens=1), f"x-request-id: r{number}")
        for number in range(60):
            assert f"chatcmpl-r{number}".encode() in (await raw.answer())[2]
        assert len(json.loads(await engine.get("/sim/requests"))) == 60


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=6), st.booleans())
def test_a_request_may_be_cut_anywhere(cuts, chunked):
    async def run() -> None:
        body = json.dumps(chat(max_tokens=2)).encode()
        if chunked:
            pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
            framed = b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]) + b"0\r\n\r\n"
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            data = head.encode() + b"transfer-encoding: chunked\r\n\r\n" + framed
        else:
            data = request(CHAT, body)
        async with serving() as engine, engine.connect() as raw:
            at = 0
            for cut in [*cuts, len(data)]:
                raw.send(data[at : at + cut])
                await raw.writer.drain()
                await asyncio.sleep(0)
                at += cut
            status, _, answer = await raw.answer()
            assert status == 200
            assert json.loads(answer)["usage"]["completion_tokens"] == 2

    asyncio.run(run())


async def test_100_continue_comes_before_the_body_is_sent():
    async with serving() as engine, engine.connect() as raw:
        body = json.dumps(chat()).encode()
        whole = request(CHAT, body, b"expect: 100-continue")
        raw.send(whole[: -len(body)])
        assert (await raw.head())[0] == 100
        raw.send(body)
        assert (await raw.answer())[0] == 200


async def test_100_continue_waits_for_the_answer_before_it():
    async with serving(ttft_ms=30) as engine, engine.connect() as raw:
        body = json.dumps(chat()).encode()
        raw.post(CHAT, chat())
        raw.send(request(CHAT, body, b"expect: 100-continue")[: -len(body)])
        assert (await raw.answer())[0] == 200
        assert (await raw.head())[0] == 100
        raw.send(body)
        assert (await raw.answer())[0] == 200


async def test_a_body_over_the_bound_is_refused_before_it_is_read():
    async with serving(max_body_bytes=1000) as engine:
        async with engine.connect() as raw:
            raw.send(request(CHAT, b"x" * 1001)[:-1001])
            assert (await raw.answer())[0] == 413
        async with engine.connect() as raw:
            raw.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(5):
                raw.send(b"c8\r\n" + b"x" * 200 + b"\r\n")
            raw.send(b"1\r\nx\r\n")
            assert (await raw.answer())[0] == 413
        assert (await engine.post(CHAT, chat()))[0] == 200


async def test_endless_headers_are_refused():
    async with serving() as engine, engine.connect() as raw:
        raw.send(b"GET /health HTTP/1.1\r\n")
        for number in range(400):
            raw.send(b"x-%d: %b\r\n" % (number, b"y" * 1000))
        assert (await raw.head())[0] == 431


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_http_gets_400_and_a_close(garbage):
    async with serving() as engine:
        async with engine.connect() as raw:
            raw.send(garbage)
            assert (await raw.head())[0] == 400
            await raw.rest()
        assert (await engine.post(CHAT, chat()))[0] == 200


async def test_connection_close_is_honoured():
    async with serving() as engine, engine.connect() as raw:
        raw.post(CHAT, chat(), "connection: close")
        _, headers, _ = await raw.answer()
        assert headers["connection"] == "close"
        assert await raw.rest() == b""


async def test_an_http_10_client_gets_a_stream_without_chunks():
    async with serving() as engine, engine.connect() as raw:
        raw.send(request(CHAT, json.dumps(chat(stream=True)).encode()).replace(b"HTTP/1.1", b"HTTP/1.0"))
        _, headers, body = await raw.answer()
        assert "transfer-encoding" not in headers
        assert body.endswith(b"data: [DONE]\n\n")


async def test_an_idle_connection_is_closed_but_never_one_in_use():
    async with serving(keep_alive_timeout_s=0.5, ttft_ms=700) as engine, engine.connect() as raw:
        raw.post(CHAT, chat())
        assert (await raw.answer())[0] == 200
        assert await raw.rest() == b""


async def test_unknown_paths_methods_and_media_types():
    async with serving() as engine:
        assert (await engine.post("/v1/nothing", {}))[0] == 404
        assert (await engine.post("/health", {}))[0] == 405
        async with engine.connect() as raw:
            raw.send(request(CHAT, b"{}").replace(b"application/json", b"text/plain"))
            status, _, body = await raw.answer()
        assert status == 400
        assert json.loads(body)["error"]["type"] == "Bad Request"
        async with engine.connect() as raw:
            raw.get(CHAT)
            assert (await raw.answer())[0] == 405


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"messages":5}', b'{"messages":[{"content":5}]}', b"\xff\xfe", b"[" * 100_000],
)
async def test_a_body_that_is_no_request_is_refused_and_the_connection_lives(body):
    async with serving() as engine, engine.connect() as raw:
        raw.post(CHAT, body)
        assert (await raw.answer())[0] == 400
        raw.post(CHAT, chat())
        assert (await raw.answer())[0] == 200


async def test_requests_are_recorded_byte_for_byte():
    async with serving(record=2) as engine:
        bodies = [json.dumps(chat(str(number)), indent=number).encode() for number in range(3)]
        for body in bodies:
            await engine.post(CHAT, body, "X-Mixed: Case Value")
        kept = json.loads(await engine.get("/sim/requests"))
        assert [base64.b64decode(each["body_base64"]) for each in kept] == bodies[1:]
        assert kept[0]["body_sha256"] == hashlib.sha256(bodies[1]).hexdigest()
        assert ["x-mixed", "Case Value"] in kept[0]["headers"]
        assert kept[0]["target"] == CHAT


async def test_only_the_key_opens_v1():
    async with serving(api_key="k1") as engine:
        assert await engine.json(CHAT, chat(), status=401) == {"error": "Unauthorized"}
        assert (await engine.post(CHAT, chat(), "authorization: Bearer k1"))[0] == 200
        assert await engine.get("/health") == b""
