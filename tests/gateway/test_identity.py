"""Who is asking: every way a token is held and sent, and that it stops when it should, while the gateway runs."""

import base64
import hashlib
import time
from datetime import UTC, datetime

import pytest
import yaml

from tests.harness.client import CHAT, RawClient, chat
from tests.harness.gateway import endpoint, policy, running_engine, running_gateway, token, until

EXPIRES_IN_S = 6


def secret_document(name: str, **values: str) -> str:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return yaml.safe_dump(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"}, "data": data}
    )


@pytest.fixture(scope="module")
def expires_at_s() -> float:
    return float(int(time.time()) + EXPIRES_IN_S)


@pytest.fixture(scope="module")
def gateway(expires_at_s, tmp_path_factory):
    moment = datetime.fromtimestamp(expires_at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = policy(
        endpoint(),
        token("plain", "sk-plain"),
        token("hashed", None, tokenHash="sha256:" + hashlib.sha256(b"sk-hashed").hexdigest()),
        token("referred", None, tokenSecretRef={"name": "keys", "key": "chat"}),
        secret_document("keys", chat="sk-referred", other="sk-other"),
        token("short-lived", "sk-short", expiresAt=moment),
        token("off", "sk-off", disabled=True),
        token("twin-one", "sk-twin"),
        token("twin-two", None, tokenHash="sha256:" + hashlib.sha256(b"sk-twin").hexdigest()),
    )
    with running_engine() as engine, running_gateway(tmp_path_factory.mktemp("identity"), text, [engine]) as one:
        yield one


async def ask(gateway, session, headers):
    """(status, code) of one request."""
    async with session.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        if answer.status == 200:
            await answer.read()
            return 200, ""
        return answer.status, (await answer.json())["error"]["code"]


async def test_token_expires_while_the_gateway_runs(gateway, session, expires_at_s):
    headers = {"Authorization": "Bearer sk-short"}
    before = await ask(gateway, session, headers)
    if time.time() < expires_at_s:  # on a busy machine the start alone may take as long
        assert before == (200, "")
    await until(lambda: time.time() > expires_at_s + 0.05)
    assert await ask(gateway, session, headers) == (401, "token_expired")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
async def test_scheme_in_any_case(gateway, session, scheme):
    assert await ask(gateway, session, {"Authorization": f"{scheme} sk-plain"}) == (200, "")


@pytest.mark.parametrize("name", ["plain", "hashed", "referred"])
@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
async def test_every_way_a_secret_is_held_and_sent(gateway, session, name, header):
    value = f"sk-{name}" if header == "x-api-key" else f"Bearer sk-{name}"
    assert await ask(gateway, session, {header: value}) == (200, "")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "missing_token"),
        ({"Authorization": ""}, "missing_token"),
        ({"Authorization": "Bearer"}, "missing_token"),
        ({"Authorization": "Bearer   "}, "missing_token"),
        ({"Authorization": "Basic c2stcGxhaW46"}, "missing_token"),
        ({"Authorization": "sk-plain"}, "missing_token"),
        ({"x-api-key": ""}, "missing_token"),
        ({"Authorization": "Bearer sk-plai"}, "invalid_token"),
        ({"Authorization": "Bearer sk-plain2"}, "invalid_token"),
        ({"Authorization": "Bearer SK-PLAIN"}, "invalid_token"),
        ({"Authorization": "Bearer sk-other"}, "invalid_token"),
        ({"Authorization": "Bearer sha256:" + hashlib.sha256(b"sk-hashed").hexdigest()}, "invalid_token"),
        ({"Authorization": "Bearer sk-off"}, "token_disabled"),
        ({"x-api-key": "sk-off"}, "token_disabled"),
        ({"Authorization": "Bearer sk-twin"}, "token_ambiguous"),
        ({"Authorization": "Bearer " + "x" * 30_000}, "invalid_token"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
async def test_refused(gateway, session, headers, expected):
    assert await ask(gateway, session, headers) == (401, expected)


async def test_bearer_token_wins_over_an_api_key(gateway, session):
    both = {"Authorization": "Bearer sk-plain", "x-api-key": "sk-nobody"}
    assert await ask(gateway, session, both) == (200, "")
    both = {"Authorization": "Bearer sk-nobody", "x-api-key": "sk-plain"}
    assert await ask(gateway, session, both) == (401, "invalid_token")


async def test_two_authorization_headers_are_no_way_around(gateway):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-nobody\r\n"
    async with RawClient(gateway.url) as client:
        await client.send(head + b"Authorization: Bearer sk-plain\r\nContent-Length: 2\r\n\r\n{}")
        assert (await client.answer()).status == 401


async def test_secret_outside_ascii(gateway):
    async with RawClient(gateway.url) as client:
        answer = await client.request(b"{}", headers={"Authorization": "Bearer \xe9\xff"})
    assert (answer.status, answer.code) == (401, "invalid_token")
