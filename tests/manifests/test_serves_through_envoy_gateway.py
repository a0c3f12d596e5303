"""What clients meet at the gateway: Envoy Gateway drives a real Envoy, which asks the pod of our manifests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from apis.headers import PIN_HEADER
from tests.harness import kubernetes
from tests.harness.gateway import sum_series
from tests.harness.kubernetes import Object
from tests.manifests.conftest import MANIFESTS
from tests.manifests.platform import JUDGED, Platform
from tests.manifests.tenant import LEFT, MODEL, RIGHT, TENANT, Tenant, secret_of
from tests.reconcile.conftest import wait_for

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
RICH = {"Authorization": f"Bearer {secret_of('rich')}"}


@pytest.fixture(autouse=True)
def served(tenant: Tenant) -> Tenant:
    return tenant


async def ask(session: aiohttp.ClientSession, headers: dict[str, str], **body: Any) -> tuple[int, Any]:
    async with session.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers) as answer:
        return answer.status, json.loads(await answer.text())


def engine_session(platform: Platform, pod: Object) -> aiohttp.ClientSession:
    """Past the gateway, to the engine itself."""
    connector = aiohttp.UnixConnector(str(platform.gateway.room.reach(pod["status"]["podIP"], 8080)))
    return aiohttp.ClientSession("http://engine", connector=connector)


async def generated(platform: Platform, pod: Object) -> float:
    """Tokens, by the engine's own word."""
    return sum_series(await platform.metrics(pod, 8080), "vllm:generation_tokens_total")


async def test_a_long_prompt_passes_the_buffer_that_is_32_kib_by_default(session):
    status, answer = await ask(session, RICH, messages=[{"role": "user", "content": "word " * 100_000}])
    assert status == 200, answer


async def test_a_body_over_50_mib_is_413_in_openais_shape(platform):
    length = 50 * 1024 * 1024 + 1
    reader, writer = await asyncio.open_unix_connection(platform.entrance)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\ncontent-length: {length}\r\n"
    writer.write(head.encode() + b"authorization: Bearer sk-rich\r\n\r\n" + b" " * length)
    async with asyncio.timeout(30):
        answer = await reader.readuntil(b"}}")
    writer.transport.abort()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"


async def test_an_unknown_token_is_401_in_openais_shape(session):
    async with session.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer no"}) as answer:
        assert answer.status == 401
        assert answer.headers["x-error-token"] == "true"
        assert (await answer.json())["error"]["code"] == "invalid_token"


async def test_a_path_that_is_none_is_refused_by_extproc_not_routed(session):
    async with session.get("/metrics", headers=RICH) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "unknown_path")
    async with session.get("/v1/models", headers=RICH) as answer:
        assert [item["id"] for item in (await answer.json())["data"]] == [MODEL]


async def test_each_answer_comes_from_the_engine_that_extproc_picked(tenant, platform, session):
    pods = {**tenant.pods(LEFT), **tenant.pods(RIGHT)}
    addresses = {name: f"{pod['status']['podIP']}:8080" for name, pod in pods.items()}
    answered = {}
    for number in range(20):
        status, answer = await ask(session, {**RICH, "x-request-id": f"pick-{number}"})
        assert status == 200
        answered[f"pick-{number}"] = addresses[answer["model"]]
    assert set(answered.values()) == set(addresses.values()), "both take part"
    await platform.ledger.row_of("pick-19")
    picked = {row["request_id"]: row["engine"] for row in platform.ledger.usage() if row["request_id"] in answered}
    assert picked == answered


async def test_an_engine_that_is_not_ready_gets_nothing_whatever_a_client_says(tenant, platform, session):
    """Envoy keeps it as a host, and would follow a pin to it."""
    ((name, pod),) = tenant.pods(LEFT).items()
    room = tenant.room

    def ready(item: Object) -> bool:
        return any(each["type"] == "Ready" and each["status"] == "True" for each in item["status"]["conditions"])

    async with engine_session(platform, pod) as engine:
        try:
            await (await engine.post("/sim/faults", json={"health_status": 503})).read()
            await room.until("Pod", name, lambda item: not ready(item))
            await room.until("ArksApplication", LEFT, lambda item: item["status"]["readyReplicas"] == 0)
            async with asyncio.timeout(90):
                while name in [(await ask(session, RICH))[1]["model"] for _ in range(4)]:  # extproc hears of it later
                    pass
            before = await generated(platform, pod)
            pinned = {PIN_HEADER: f"{pod['status']['podIP']}:8080"}
            forged = {**pinned, "model": MODEL, "namespace": TENANT, "username": "rich"}
            for _ in range(10):
                status, answer = await ask(session, {**RICH, **forged})
                assert (status, answer["model"] != name) == (200, True)
            assert (await ask(session, forged))[0] == 401
            async with session.get("/metrics", headers=forged) as answer:
                assert answer.status in {401, 404}
            assert await generated(platform, pod) == before
        finally:
            await (await engine.post("/sim/faults", json={})).read()
    async with asyncio.timeout(90):
        while (await ask(session, RICH))[1]["model"] != name:  # it has its share again
            pass


async def test_a_client_that_left_and_an_engine_that_died_are_told_apart_by_the_access_log(platform, session):
    long = {**CHAT, "stream": True, "max_tokens": 2000}
    async with session.post("/v1/chat/completions", json=long, headers={**RICH, "x-request-id": "left"}) as answer:
        await answer.content.readline()
        answer.close()
    assert (await platform.ledger.row_of("left"))["error"] == "client_disconnected"
    broken = {**RICH, "x-request-id": "died", "x-sim-fault": "reset_after_chunks=3"}
    with pytest.raises(aiohttp.ClientPayloadError):
        async with session.post("/v1/chat/completions", json=long, headers=broken) as answer:
            await answer.read()
    assert (await platform.ledger.row_of("died"))["error"] == "engine_lost"


async def test_without_extproc_nothing_passes(tenant, platform, session):
    engines = [*tenant.pods(LEFT).values(), *tenant.pods(RIGHT).values()]
    before = [await generated(platform, pod) for pod in engines]
    system = platform.room("arks-system")
    scale_extproc(platform, 0)
    try:
        await wait_for(lambda: not system.list("Pod"))
        for headers in (RICH, {**RICH, "model": MODEL, "namespace": TENANT}):
            async with session.post("/v1/chat/completions", json=CHAT, headers=headers) as answer:
                assert answer.status == 503
        assert [await generated(platform, pod) for pod in engines] == before
    finally:
        scale_extproc(platform, 1)
        await tenant.until_served(MODEL)


def scale_extproc(platform: Platform, replicas: int) -> None:
    path = f"{platform.api.path('apps/v1', 'Deployment', 'arks-system')}/arks/scale"
    patch = {"spec": {"replicas": replicas}}
    platform.api.request("PATCH", path, patch, content_type="application/merge-patch+json")


# --- TLS -----------------------------------------------------------------------------------------------------------


def certificates(folder: Path) -> list[Object]:
    """A pair for each tenant, in its namespace. Envoy Gateway minds when their names overlap, not what they are."""
    folder.mkdir()
    subprocess.run([kubernetes.binaries()[2], folder], check=True, timeout=30)
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": "models-example-com", "namespace": tenant},
            "data": {
                key: base64.b64encode((folder / f"{name}.{ending}").read_bytes()).decode()
                for key, ending in (("tls.crt", "crt"), ("tls.key", "key"))
            },
        }
        for tenant, name in (("team-a", "apiserver"), ("team-b", "client"))
    ]


async def over_tls(path: Path, host: str, request_id: str = "") -> tuple[int, bytes]:
    """Status of a chat there, and what certificate answered."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_unix_connection(path, ssl=context, server_hostname=host)
    body = json.dumps(CHAT).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\ncontent-length: {len(body)}\r\n"
    head += f"content-type: application/json\r\nauthorization: Bearer sk-rich\r\nx-request-id: {request_id}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        async with asyncio.timeout(30):
            answer = await reader.readline()
        return int(answer.split(maxsplit=2)[1]), writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()


@pytest.fixture
def domains(platform: Platform, tenant: Tenant, product: list[Object], tmp_path: Path) -> Iterator[Path]:
    """The example applied; the way to its listeners. It takes the Gateway's own over, so that one is put back."""
    platform.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}})
    platform.api.apply(*certificates(tmp_path / "certificates"), MANIFESTS / "gateway" / "examples" / "tenants.yaml")
    # Routes of other namespaces than these two are refused from here on.
    platform.gateway.settle(each for each in JUDGED if each[1] != "HTTPRoute")
    yield platform.gateway.entrance(443)
    platform.api.apply(*(item for item in product if item["kind"] == "Gateway"))
    asyncio.run(tenant.until_served(MODEL))


async def test_each_tenant_has_a_domain_a_certificate_and_only_its_own_models_there(platform, tenant, domains):
    deadline = time.monotonic() + 90
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            status, first = await over_tls(domains, "team-a.models.example.com")
            if status == 200:
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    for _ in range(10):
        status, second = await over_tls(domains, "team-b.models.example.com", "neighbour")
        # Admitted, for the token is good everywhere; but the tenant's model has no route on the neighbour's domain.
        assert status == 503
    assert first != second
    assert [(await over_tls(domains, "team-a.models.example.com"))[0] for _ in range(4)] == [200] * 4
    # No engine was asked, so none is taken for lost.
    assert {row["error"] for row in await platform.ledger.rows_of("neighbour", 10)} == {"engine_unreachable"}
    async with platform.session() as session:
        with pytest.raises(aiohttp.ClientError):
            await ask(session, RICH)
