"""Embeddings, rerank and score on vLLM's pooling runner: prompts are counted, answers are not."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.engines_real.books import Books
from tests.engines_real.client import Client
from tests.engines_real.process import Vllm, running_vllm
from tests.harness.gateway import endpoint, policy, running_gateway, token

MODELS = ("embed", "rank")
POLICY = policy(*(endpoint(name) for name in MODELS), token("alice", "sk-alice", MODELS))
TEXTS = ["A quick brown fox", "Numbers from 0 to 9", "The gateway counts every token that an engine reads and writes."]


@pytest.fixture(scope="module", params=MODELS)
def pooling(request, made, tmp_path_factory) -> Iterator[Vllm]:
    """Serves under its model's name; one of them runs at a time."""
    flags = ("--runner", "pooling", "--max-model-len", "512")
    with running_vllm(tmp_path_factory.mktemp(request.param), request.param, (request.param,), *flags) as one:
        yield one


@pytest.fixture(scope="module")
def pooling_gateway(pooling, tmp_path_factory):
    with running_gateway(tmp_path_factory.mktemp("gateway"), POLICY, [pooling.url]) as one:
        yield one


async def test_every_prompt_is_counted(pooling, pooling_gateway, session, request):
    model = request.node.callspec.params["pooling"]
    client = Client(session, pooling_gateway.url, "sk-alice")
    books = await Books(pooling, pooling_gateway).open(session)
    query = "What does the gateway count?"
    asked = [
        ("/v1/rerank", {"query": query, "documents": TEXTS, "top_n": 1}),
        ("/v1/rerank", {"query": query, "documents": TEXTS * 20}),
        ("/v1/score", {"text_1": query, "text_2": TEXTS}),
        ("/v1/score", {"text_1": TEXTS, "text_2": TEXTS}),
    ]
    if model == "embed":
        asked += [
            ("/v1/embeddings", {"input": "Hello"}),
            ("/v1/embeddings", {"input": TEXTS}),
            ("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
            ("/v1/embeddings", {"input": [[5, 6, 7], [8, 9]]}),
            # An answer that is longer than what the tap reads whole.
            ("/v1/embeddings", {"input": TEXTS * 400}),
        ]
    answers = await asyncio.gather(*(client.ok(path, {"model": model, **body}) for path, body in asked))
    for answer in answers:
        row = await pooling_gateway.row_of(answer.request_id)
        assert (row["status"], row["accuracy"], row["completion_tokens"]) == (200, "exact", 0)
        assert row["prompt_tokens"] == answer.json["usage"]["prompt_tokens"] > 0
    page = await books.page(session)
    assert page.unexplained.prompt == page.unexplained.generation == 0, page
    print(f"{model}: {len(page.exact)} rows, prompt {page.engine.prompt}")


async def test_overlong_text_is_refused_in_the_engines_words(pooling, pooling_gateway, session, request):
    model = request.node.callspec.params["pooling"]
    client = Client(session, pooling_gateway.url, "sk-alice")
    answer = await client.ask("/v1/score", {"model": model, "text_1": "word " * 2000, "text_2": "other"})
    assert answer.status == 400
    row = await pooling_gateway.row_of(answer.request_id)
    assert (row["status"], row["prompt_tokens"], row["error"]) == (400, 0, "engine_refused")
