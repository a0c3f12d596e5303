"""Answers of every API, plain and streamed, healthy and awkward.

The client gets what the engine alone would have given, byte for byte, and the ledger gets what the engine counted.
"""

import gzip
import json
import re
import uuid

import aiohttp
import pytest

from tests.harness.client import CHAT, bearer, chat, contents, events
from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token

POLICY = policy(endpoint(), token("alice", "sk-alice", rates={"rpm": 10**6, "tpm": 10**9}))
ALICE = bearer("sk-alice")
MODEL = {"model": "qwen-7b"}
APIS = {
    CHAT: chat(max_tokens=7),
    "/v1/completions": {**MODEL, "prompt": "Once upon", "max_tokens": 6},
    "/v1/responses": {**MODEL, "input": "Hello", "max_output_tokens": 5},
    "/v1/messages": {**MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
    "/v1/embeddings": {**MODEL, "input": ["one", "two words"]},
    "/v1/rerank": {**MODEL, "query": "which", "documents": ["this one", "that one"]},
    "/v1/score": {**MODEL, "text_1": "left", "text_2": ["right", "wrong"]},
}
STREAMING = list(APIS)[:4]
ASKED = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def engine():
    with running_engine("--allow-fault-headers", "--prompt-tokens-details", "--prefix-cache", "--awkward-text") as one:
        yield one


@pytest.fixture(scope="module", params=["h2", "grpc_aio"])
def gateway(request, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    with running_gateway(folder, POLICY, [engine], "--transport", request.param) as one:
        yield one


async def both(session, gateway, engine, path, body, fault=""):
    """The same request through the gateway and to the engine alone: (answer, body), body, row."""
    headers = {**ALICE, "x-request-id": str(uuid.uuid4()), **({"x-sim-fault": fault} if fault else {})}
    async with session.post(engine.url + path, json=body, headers=headers) as answer:
        alone = await answer.read()
    async with session.post(gateway.url + path, json=body, headers=headers) as answer:
        through = await answer.read()
    return answer, _timeless(through), _timeless(alone), await gateway.row_of(headers["x-request-id"])


def _timeless(body: bytes) -> bytes:
    if body.startswith(b"\x1f\x8b"):
        return b"gzip " + _timeless(gzip.decompress(body))
    body = re.sub(rb'"created(_at)?":\s?\d+', b'"created":0', body)
    # vLLM's last event before [DONE] says who it is; asked for usage, that is the usage event.
    body = re.sub(rb',"system_fingerprint":"[^"]*"(?=}\r?\n)', b"", body)
    # A comment before the hidden event stays.
    body = body.replace(b": keep-alive\r\n\r\n", b"").replace(b": keep-alive\n\n", b"")
    return re.sub(rb'"cached_tokens":\d+', b'"cached_tokens":0', body)


def _counted(usage):
    """(prompt, completion) of any API's usage object."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", usage.get("total_tokens")))
    prompt += usage.get("cache_read_input_tokens") or 0
    prompt += usage.get("cache_creation_input_tokens") or 0
    return prompt, usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0


@pytest.mark.parametrize("path", APIS)
async def test_plain_answer_is_the_engines_and_its_usage_is_the_rows(gateway, engine, session, path):
    answer, through, alone, row = await both(session, gateway, engine, path, APIS[path])
    assert answer.status == 200, through
    assert through == alone
    assert "content-length" in answer.headers
    assert (row["prompt_tokens"], row["completion_tokens"]) == _counted(json.loads(through)["usage"])
    assert row["prompt_tokens"] > 0
    assert (row["accuracy"], row["stream"], row["error"], row["status"]) == ("exact", False, "", 200)


@pytest.mark.parametrize("path", STREAMING)
async def test_stream_is_the_engines_and_usage_is_known_though_nobody_asked(gateway, engine, session, path):
    answer, through, alone, row = await both(session, gateway, engine, path, {**APIS[path], "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert through == alone
    wanted = next(value for name, value in APIS[path].items() if name.startswith("max_"))
    assert (row["completion_tokens"], row["accuracy"], row["stream"]) == (wanted, "exact", True)
    async with session.post(engine.url + path, json=APIS[path]) as plain:
        assert (row["prompt_tokens"], wanted) == _counted((await plain.json())["usage"])
    assert 0 <= row["ttft_ms"] <= row["duration_ms"]


@pytest.mark.parametrize("path", STREAMING[:2])
@pytest.mark.parametrize(
    "options", [ASKED, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}]
)
async def test_stream_with_the_usage_that_was_asked_for(gateway, engine, session, path, options):
    body = {**APIS[path], "stream": True, **options}
    _, through, alone, row = await both(session, gateway, engine, path, body)
    assert through == alone
    last = contents(through)[-1]
    assert (row["prompt_tokens"], row["completion_tokens"]) == _counted(last["usage"])


FAULTS = ["cut_every_bytes=1", "cut_every_bytes=7", "crlf", "comments", "crlf,comments,cut_every_bytes=3"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("more", [{}, ASKED], ids=["hidden", "asked"])
async def test_awkward_stream(gateway, engine, session, fault, more):
    body = chat(stream=True, max_tokens=20, **more)
    _, through, alone, row = await both(session, gateway, engine, CHAT, body, fault)
    assert through == alone
    assert (row["completion_tokens"], row["accuracy"]) == (20, "exact")


@pytest.mark.parametrize("path", STREAMING)
async def test_awkward_stream_of_another_api(gateway, engine, session, path):
    body = {**APIS[path], "stream": True}
    _, through, alone, row = await both(session, gateway, engine, path, body, "crlf,comments,cut_every_bytes=5")
    assert through == alone
    assert (row["accuracy"], row["error"]) == ("exact", "")


async def test_gzip_answer_of_an_engine_that_was_not_asked_for_it(gateway, engine, session):
    answer, through, alone, row = await both(session, gateway, engine, CHAT, chat(max_tokens=4), "gzip")
    assert answer.headers["content-encoding"] == "gzip"
    assert through == alone
    assert (row["completion_tokens"], row["accuracy"]) == (4, "exact")


async def test_gzip_stream_with_usage_asked_for(gateway, engine, session):
    body = chat(stream=True, max_tokens=4, **ASKED)
    answer, through, alone, row = await both(session, gateway, engine, CHAT, body, "gzip,cut_every_bytes=11")
    assert answer.headers["content-encoding"] == "gzip"
    assert through == alone
    assert row["completion_tokens"] == 4


async def test_gzip_stream_with_usage_hidden_goes_out_decoded(gateway, engine, session):
    body = chat(stream=True, max_tokens=4)
    answer, through, alone, row = await both(session, gateway, engine, CHAT, body, "gzip,cut_every_bytes=11")
    assert "content-encoding" not in answer.headers
    assert b"gzip " + through == alone
    assert row["completion_tokens"] == 4


async def test_engine_is_never_asked_to_compress(gateway, engine, session):
    """A compressed stream would have to be decoded for every client that did not ask for usage."""
    headers = {**ALICE, "Accept-Encoding": "gzip, br"}
    async with session.post(gateway.url + CHAT, json=chat(), headers=headers) as answer:
        assert "content-encoding" not in answer.headers
        assert (await answer.json())["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_no_usage_at_all_is_estimated_from_what_was_delivered(gateway, engine, session, stream):
    body = chat(max_tokens=40, stream=stream)
    _, _, _, row = await both(session, gateway, engine, CHAT, body, "no_usage")
    assert row["accuracy"] == "estimated"
    assert 10 <= row["completion_tokens"] <= 40
    assert row["prompt_tokens"] > 0


@pytest.mark.parametrize("placement", ["own", "finish", "continuous"])
@pytest.mark.parametrize("more", [{}, ASKED], ids=["hidden", "asked"])
async def test_usage_in_every_place_is_read_and_never_added_up(gateway, engine, session, placement, more):
    body = chat(stream=True, max_tokens=12, **more)
    _, through, _, row = await both(session, gateway, engine, CHAT, body, f"usage={placement}")
    assert (row["completion_tokens"], row["accuracy"]) == (12, "exact")
    assert events(through)[-1] == "[DONE]"
    if not more:
        assert all(one["choices"] for one in contents(through))


async def test_error_event_before_done_fails_the_row(gateway, engine, session):
    body = chat(stream=True, max_tokens=12)
    answer, through, alone, row = await both(session, gateway, engine, CHAT, body, "error_after_chunks=5")
    assert answer.status == 200
    assert through == alone
    assert events(through)[-1] == "[DONE]"
    assert row["error"] == "engine_error"
    assert 0 < row["completion_tokens"] <= 12


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
async def test_engines_own_error_passes_and_costs_no_tokens(gateway, engine, session, status):
    answer, through, alone, row = await both(session, gateway, engine, CHAT, chat(stream=True), f"status={status}")
    assert answer.status == status
    assert through == alone
    assert "x-error-routing" not in answer.headers
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == (status, 0, 0)
    assert row["error"] == ("engine_error" if status >= 500 else "engine_refused")


async def test_plain_answer_that_ends_too_early_is_no_success(gateway, engine, session):
    headers = {**ALICE, "x-request-id": str(uuid.uuid4()), "x-sim-fault": "content_length_delta=100"}
    try:
        async with session.post(gateway.url + CHAT, json=chat(), headers=headers) as answer:
            # Nothing had gone out yet: Envoy could still say so.
            assert (answer.status, (await answer.json())["error"]["code"]) == (502, "engine_broken")
    except aiohttp.ClientPayloadError:
        pass  # its beginning had gone out: cut, for the client to see
    row = await gateway.row_of(headers["x-request-id"])
    assert (row["status"], row["error"], row["accuracy"]) == (502, "engine_lost", "estimated")
