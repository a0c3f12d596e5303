"""Defects of Arks in who may pass, through a real Envoy: each test is named after its number in the inventory."""

from __future__ import annotations

import itertools
import json
import os

import pytest

from tests.harness.client import CHAT, RawClient, bearer, chat, head
from tests.harness.gateway import document, endpoint, policy, running_engine, running_gateway, token, until

SECRET = "sk-Defect07unknownToken"
FORGED = {"namespace": "default", "model": "qwen-7b", "username": "alice"}
"""what Arks' routes match on, sent by a client"""


@pytest.fixture(scope="module")
def engine():
    with running_engine("--record", "50", "--model", "secluded", "--model", "theirs") as one:
        yield one


@pytest.fixture(scope="module")
def gateway(engine, tmp_path_factory):
    text = policy(
        endpoint(),
        endpoint("secluded"),
        document("ArksEndpoint", "theirs", {"gatewayRef": {"name": "arks-eg"}}, namespace="other"),
        token("alice", "sk-alice"),
        token("slow", "sk-slow", rates={"rpm": 0}),
    )
    with running_gateway(tmp_path_factory.mktemp("refusals"), text, [engine]) as one:
        yield one


async def answers(gateway, session) -> int:
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=2), headers=bearer("sk-alice")) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize("secret", ["sk-alice", "x"], ids=["known", "any"])
async def test_defect_01_no_request_without_a_body_ends_the_process(gateway, engine, session, secret):
    """Arks' plugin dereferenced what only a body's message would have set."""
    paths = (CHAT, "/v1/completions", "/v1/embeddings", "/v1/models/x", "/", "/metrics")
    for method, path in itertools.product(("GET", "POST", "HEAD", "OPTIONS", "DELETE"), paths):
        async with session.request(method, gateway.url + path, headers={**bearer(secret), **FORGED}) as answer:
            assert 400 <= answer.status < 406, (method, path, answer.status)
    # Several at once, and clients that leave before their answer.
    for _ in range(20):
        async with RawClient(gateway.url) as client:
            await client.send(head("GET", CHAT, bearer(secret)))
    assert await answers(gateway, session) == 200
    os.kill(gateway.extproc_pid, 0)
    assert "a part died" not in gateway.log()


@pytest.mark.parametrize("secret", ["sk-alice", "sk-nobody", None], ids=["known", "unknown", "none"])
async def test_defect_02_nothing_without_a_body_reaches_an_engine_whatever_headers_say(
    gateway, engine, session, secret
):
    """Arks looked at the token only with the body, and its routes believed the client's own headers."""
    await engine.recorded(session)
    headers = {**FORGED, **(bearer(secret) if secret else {})}
    paths = (CHAT, "/metrics", "/health", "/v1/load_lora_adapter")
    for method, path in itertools.product(("GET", "POST", "PUT"), paths):
        async with session.request(method, gateway.url + path, headers=headers) as answer:
            expected = {401} if secret != "sk-alice" else {400, 404, 405}
            assert answer.status in expected, (method, path, answer.status)
    assert await engine.recorded(session) == []


async def test_defect_02_a_clients_headers_lead_to_no_other_tenant(gateway, engine, session):
    await engine.recorded(session)
    headers = {**bearer("sk-alice"), "namespace": "other", "model": "theirs", "username": "root"}
    async with session.post(gateway.url + CHAT, json=chat(model="theirs"), headers=headers) as answer:
        assert answer.status == 404
    async with session.post(gateway.url + CHAT, json=chat(), headers=headers) as answer:
        assert answer.status == 200
    (arrived,) = await engine.recorded(session)
    assert {name: arrived["headers"][name] for name in FORGED} == FORGED


@pytest.mark.parametrize("size_bytes", [33_000, 200_000])
async def test_defect_04_a_long_prompt_arrives(gateway, engine, session, size_bytes):
    """Envoy's buffer is 32 KiB by default. See `rendered` for the policy that widens Envoy Gateway's."""
    await engine.recorded(session)
    sent = chat(max_tokens=2, messages=[{"role": "user", "content": "x" * size_bytes}])
    async with session.post(gateway.url + CHAT, json=sent, headers=bearer("sk-alice")) as answer:
        assert answer.status == 200
    (arrived,) = await engine.recorded(session)
    assert json.loads(arrived["body"]) == sent


async def test_defect_07_an_unknown_token_is_401_and_its_secret_is_nowhere(gateway, session):
    async with session.post(gateway.url + CHAT, json=chat(), headers=bearer(SECRET)) as answer:
        told = await answer.read()
        assert (answer.status, json.loads(told)["error"]["code"]) == (401, "invalid_token")
        assert SECRET.encode() not in told
        assert SECRET not in str(answer.headers)
        request_id = answer.headers["x-request-id"]
    await until(lambda: request_id in gateway.access_log.read_text())
    assert SECRET not in gateway.access_log.read_text()
    assert SECRET not in gateway.log()
    assert SECRET not in await gateway.metrics(session)


async def test_defect_07_a_model_that_is_not_the_tokens_is_403_and_none_is_404(gateway, session):
    for model, expected in (("secluded", (403, "model_not_allowed")), ("nowhere", (404, "model_not_found"))):
        async with session.post(gateway.url + CHAT, json=chat(model=model), headers=bearer("sk-alice")) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == expected


async def test_defect_07_a_429_says_when_to_come_back(gateway, session):
    async with session.post(gateway.url + CHAT, json=chat(), headers=bearer("sk-slow")) as answer:
        assert answer.status == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
