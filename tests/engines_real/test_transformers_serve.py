"""`transformers serve` behind the gateway: usage on the finish chunk, no [DONE], a model name that is a path."""

import asyncio
import json

import pytest

from scripts import engines
from tests.engines_real.client import CHAT, RESPONSES, Client
from tests.engines_real.process import free_port, running_program
from tests.harness.gateway import endpoint, policy, running_gateway, token


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """(gateway, model name)"""
    model, port = str(engines.models() / "chat"), free_port()
    command = [str(engines.environment() / "bin" / "transformers"), "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    documents = policy(endpoint("tiny", modelName=model), token("alice", "sk-alice", ("tiny",)))
    folder = tmp_path_factory.mktemp("served")
    with (
        running_program(folder, command, port) as engine,
        running_gateway(folder / "gateway", documents, [engine.url]) as gateway,
    ):
        yield gateway, model


@pytest.fixture
def client(served, session) -> Client:
    return Client(session, served[0].url, "sk-alice")


def body(path, model, tokens, **fields):
    if path == RESPONSES:
        return {"model": model, "input": "Hello!", "max_output_tokens": tokens, **fields}
    return {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": tokens, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_answer_is_counted(path, stream, served, client):
    gateway, model = served
    answer = await client.ok(path, body(path, model, 7, stream=stream))
    if path == CHAT:
        # What rides on a chunk with content stays there, asked for or not.
        usage = answer.events[-1]["usage"] if stream else answer.json["usage"]
        told = usage["prompt_tokens"], usage["completion_tokens"]
        assert "[DONE]" not in answer.data
    else:
        usage = (answer.events[-1]["response"] if stream else answer.json)["usage"]
        told = usage["input_tokens"], usage["output_tokens"]
    row = await gateway.row_of(answer.request_id)
    assert (row["prompt_tokens"], row["completion_tokens"]) == told
    assert (told[1], row["accuracy"], row["status"], row["error"]) == (7, "exact", 200, "")


async def test_refusal_passes_in_the_engines_words(served, client):
    gateway, model = served
    answer = await client.ask(CHAT, body(CHAT, model, 7, never_heard_of=1))
    assert answer.status == 422
    assert "never_heard_of" in answer.json["detail"]
    row = await gateway.row_of(answer.request_id)
    assert (row["status"], row["prompt_tokens"], row["error"]) == (422, 0, "engine_refused")


async def test_leaving_is_charged_by_what_was_delivered(served, client):
    gateway, model = served
    async with client.stream(CHAT, body(CHAT, model, 1000, stream=True)) as (request_id, events):
        seen = 0
        async for data in events:
            seen += bool(json.loads(data)["choices"][0]["delta"].get("content"))
            if seen == 10:
                break
    async with asyncio.timeout(20):
        row = await gateway.row_of(request_id)
    assert (row["status"], row["accuracy"]) == (499, "estimated")
    assert 10 <= row["completion_tokens"] < 1000
