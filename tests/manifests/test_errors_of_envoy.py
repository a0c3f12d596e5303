"""What Envoy answers by itself behind Envoy Gateway, as docs/errors.md has it: bare, without OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness.kubernetes import Object
from tests.manifests.platform import Platform
from tests.manifests.tenant import MODEL, Tenant, secret_of
from tests.manifests.test_serves_through_envoy_gateway import domains  # noqa: F401 - a fixture
from tests.reconcile.conftest import wait_for

CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}).encode()
DOMAIN = "team-a.models.example.com"


class Reply(NamedTuple):
    status: int
    headers: str
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


@pytest.fixture(autouse=True)
def served(tenant: Tenant) -> Tenant:
    return tenant


def head(*more: str, host: str = "gateway", length: int = len(CHAT), path: str = "/v1/chat/completions") -> bytes:
    token = f"authorization: Bearer {secret_of('rich')}"
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", token, "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {length}", *more, "", ""]).encode()


async def sent(where: Path, request: bytes, timeout_s: float = 30.0, **tls: Any) -> Reply:
    """One answer; raises OSError or IncompleteReadError where the connection ends without one."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(where, **tls)
        try:
            writer.write(request)
            top = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if length := re.search(r"content-length: (\d+)", top):
                body = await reader.readexactly(int(length[1]))
            else:
                whole = await reader.readuntil(b"0\r\n\r\n")
                body = whole.partition(b"\r\n")[2].partition(b"\r\n")[0]
        finally:
            writer.transport.abort()
    return Reply(int(top.split(maxsplit=2)[1]), top, body)


async def test_a_request_that_is_right_is_served(platform: Platform):
    """What the refusals below are held against."""
    assert (await sent(platform.entrance, head() + CHAT)).status == 200


@pytest.mark.parametrize(
    "request_", [b"NONSENSE\r\n\r\n", head("transfer-encoding: chunked") + b"0\r\n\r\n"], ids=["no-http", "two-lengths"]
)
async def test_broken_http_is_400_in_plain_text(platform: Platform, request_: bytes):
    reply = await sent(platform.entrance, request_)
    assert (reply.status, reply.body) == (400, b"Bad Request")
    assert "text/plain" in reply.headers


@pytest.mark.parametrize(
    "more", [["x-big: " + "y" * 62_000], [f"x-{number}: y" for number in range(100)]], ids=["bytes", "number"]
)
async def test_headers_over_60_kib_or_100_are_431_in_plain_text(platform: Platform, more: list[str]):
    reply = await sent(platform.entrance, head(*more) + CHAT)
    assert (reply.status, reply.body) == (431, b"Request Header Fields Too Large")
    assert "x-error-" not in reply.headers


async def test_up_to_60_kib_of_headers_and_85_of_them_pass(platform: Platform):
    assert (await sent(platform.entrance, head("x-big: " + "y" * 58_000) + CHAT)).status == 200
    assert (await sent(platform.entrance, head(*(f"x-{number}: y" for number in range(80))) + CHAT)).status == 200


async def test_headers_that_leave_no_room_for_ours_are_503_and_empty(platform: Platform):
    reply = await sent(platform.entrance, head(*(f"x-{number}: y" for number in range(93))) + CHAT)
    assert (reply.status, reply.body) == (503, b"")


async def test_without_extproc_every_request_is_503_and_empty(tenant: Tenant, platform: Platform):
    scale(platform, 0)
    try:
        system = platform.room("arks-system")
        await wait_for(lambda: not system.list("Pod"))
        for request in (head() + CHAT, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", head(path="/nope") + CHAT):
            reply = await sent(platform.entrance, request)
            assert (reply.status, reply.body) == (503, b"")
            assert "x-error-" not in reply.headers
    finally:
        scale(platform, 1)
        await tenant.until_served(MODEL)


def scale(platform: Platform, replicas: int) -> None:
    path = f"{platform.api.path('apps/v1', 'Deployment', 'arks-system')}/arks/scale"
    patch = {"spec": {"replicas": replicas}}
    platform.api.request("PATCH", path, patch, content_type="application/merge-patch+json")


# --- what takes minutes, with shorter times ------------------------------------------------------------------------


@pytest.fixture
def impatient(platform: Platform, product: list[Object]) -> Iterator[None]:
    """The policies' times, shortened."""

    def patch(kind: str, http: Object | None) -> None:
        (policy,) = (item for item in product if item["kind"] == kind)
        meta = policy["metadata"]
        path = f"{platform.api.path(policy['apiVersion'], kind, meta['namespace'])}/{meta['name']}"
        timeout = policy["spec"]["timeout"] if http is None else {"http": http}
        body = {"spec": {"timeout": timeout}}
        platform.api.request("PATCH", path, body, content_type="application/merge-patch+json")

    # Far enough apart that it is plain which of them ends.
    patch("ClientTrafficPolicy", {"requestHeadersReceivedTimeout": "1s", "requestReceivedTimeout": "3s"})
    patch("BackendTrafficPolicy", {"streamIdleTimeout": "3s"})
    yield
    patch("ClientTrafficPolicy", None)
    patch("BackendTrafficPolicy", None)


async def until_answered(where: Path, request: bytes, status: int) -> Reply:
    """The policies arrive at Envoy when they do."""
    deadline = time.monotonic() + 90
    while True:
        with contextlib.suppress(TimeoutError):
            reply = await sent(where, request, 5.0)
            if reply.status == status:
                return reply
        assert time.monotonic() < deadline


@pytest.mark.usefixtures("impatient")
async def test_what_does_not_arrive_whole_is_408_in_plain_text_and_a_silent_engine_504_in_our_shape(
    tenant: Tenant, platform: Platform
):
    reply = await until_answered(platform.entrance, head(length=500) + b"{", 408)
    assert reply.body == b"request timeout"
    reply = await until_answered(platform.entrance, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", 408)
    assert reply.body == b"request header timeout"
    # A request that extproc has seen is told in its words, whoever ends it.
    silent = head("x-sim-fault: first_byte_delay_ms=20000") + CHAT
    reply = await until_answered(platform.entrance, silent, 504)
    assert reply.code == "engine_timeout"
    assert "x-error-routing: true" in reply.headers


# --- a domain per tenant -------------------------------------------------------------------------------------------


async def test_domains_that_are_not_the_tenants(platform: Platform, tenant: Tenant, domains: Path):  # noqa: F811
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def asked(certificate: str, host: str) -> Reply:
        return await sent(domains, head(host=host) + CHAT, ssl=context, server_hostname=certificate)

    deadline = time.monotonic() + 90
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await asked(DOMAIN, DOMAIN)).status == 200:
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    for host in ("elsewhere.example.com", "team-b.models.example.com"):
        reply = await asked(DOMAIN, host)
        assert (reply.status, reply.body) == (404, b"")
    with pytest.raises((OSError, asyncio.IncompleteReadError)):
        await asked("elsewhere.example.com", "elsewhere.example.com")
    # Another tenant's domain, by right: the token is good, the model has no route there.
    reply = await asked("team-b.models.example.com", "team-b.models.example.com")
    assert (reply.status, reply.code) == (503, "engine_unreachable")
