"""Plain and streamed answers through a real Envoy: untouched but for the usage event nobody asked for, and metered."""

import asyncio
import json
import subprocess
import sys

import pytest

from tests.harness.gateway import Gateway, endpoint, policy, running_engine, running_gateway, token

POLICY = policy(endpoint(), token("alice", "sk-alice", rates={"rpm": 10**6, "tpm": 10**9}))
ALICE = {"Authorization": "Bearer sk-alice"}


@pytest.fixture(scope="module")
def engine():
    with running_engine("--record", "50", "--allow-fault-headers") as one:
        yield one


@pytest.fixture(scope="module", params=["h2", "grpc_aio"])
def gateway(request, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, POLICY, [engine], "--transport", request.param) as one:
        yield one


def chat(**fields):
    return {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hello there!"}], **fields}


async def test_plain_answer_is_metered_exactly(gateway: Gateway, session):
    async with session.post(f"{gateway.url}/v1/chat/completions", json=chat(max_tokens=7), headers=ALICE) as answer:
        body = await answer.json()
        assert answer.status == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "1000000"
        assert int(answer.headers["content-length"]) > 0
        request_id = answer.headers["x-request-id"]
    row = await gateway.row_of(request_id)
    assert (row["token"], row["namespace"], row["model"], row["status"]) == ("alice", "default", "qwen-7b", 200)
    assert row["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert row["completion_tokens"] == body["usage"]["completion_tokens"] == 7
    assert row["accuracy"] == "exact"


async def test_command_prints_the_rows(gateway: Gateway):
    """`arks usage` as users run it; everywhere else its code is called in this process."""
    command = [sys.executable, "-m", "arks", "usage", "--state", str(gateway.state), "--json"]
    printed = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    assert [json.loads(line) for line in printed.stdout.splitlines()] == gateway.usage()
    wanted = {"request_id", "time", "token", "namespace", "model", "endpoint", "engine", "status", "prompt_tokens"}
    wanted |= {"completion_tokens", "cached_tokens", "reasoning_tokens", "accuracy", "stream", "duration_ms", "ttft_ms"}
    assert wanted <= gateway.usage()[0].keys()


async def test_usage_event_is_hidden_from_a_client_that_did_not_ask(gateway: Gateway, engine, session):
    sent = chat(max_tokens=5, stream=True)
    async with session.post(f"{gateway.url}/v1/chat/completions", json=sent, headers=ALICE) as answer:
        text = await answer.text()
    events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all(json.loads(one)["choices"] for one in events[:-1])
    row = await gateway.row_of(answer.headers["x-request-id"])
    assert (row["completion_tokens"], row["accuracy"], row["stream"]) == (5, "exact", True)
    assert 0 <= row["ttft_ms"] <= row["duration_ms"]


async def test_usage_event_reaches_a_client_that_asked(gateway: Gateway, session):
    sent = chat(max_tokens=5, stream=True, stream_options={"include_usage": True})
    async with session.post(f"{gateway.url}/v1/chat/completions", json=sent, headers=ALICE) as answer:
        text = await answer.text()
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
