"""Rerank and score have no one SDK: each path that a client knows is metered alike."""

import pytest

from tests.clients.conftest import MODEL, booked

RANKED = {"model": MODEL, "query": "what", "documents": ["one text", "another", "a third"]}
SCORED = {"model": MODEL, "text_1": "what", "text_2": ["one text", "another"]}


@pytest.mark.parametrize(
    ("path", "body", "list_name"),
    [
        ("/v1/rerank", RANKED, "results"),
        ("/v2/rerank", RANKED, "results"),
        ("/rerank", RANKED, "results"),
        ("/v1/score", SCORED, "data"),
        ("/score", SCORED, "data"),
    ],
)
async def test_each_path(gateway, session, path, body, list_name):
    async with session.post(gateway.url + path, json=body, headers={"Authorization": "Bearer sk-good"}) as answer:
        assert answer.status == 200
        found = await answer.json()
    assert len(found[list_name]) == len(body.get("documents") or body["text_2"])
    assert await booked(gateway, answer.headers["x-request-id"]) == (found["usage"]["prompt_tokens"], 0, 0)
