"""From `kubectl apply` of our manifests and Arks' quickstart to answers: Envoy Gateway 1.9 on a real API server drives
a real Envoy, which asks our extproc and sends to simulated engines.

What no kubelet is there for is done here: extproc and the engines are processes at `ADDRESS`, their EndpointSlices are
written by hand, and the policy folder gets the same documents that the API server got.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from apis.headers import PIN_HEADER
from apis.resources import ArksEndpoint
from controller.reconcile.desired.endpoint import Backend, desired_endpoint
from tests.harness import kubernetes
from tests.harness.envoy_gateway import ADDRESS, EnvoyGateway, on_this_host
from tests.harness.gateway import Gateway, until
from tests.harness.kubernetes import KubeApi, Object
from tests.harness.room import NoRoomError, Resident
from tests.manifests.conftest import MANIFESTS

EXTPROC_PORT, ADMIN_PORT, PINNED, OTHER = 50052, 9110, 8101, 8102
TENANT = "team-a"
GATEWAY_API = "gateway.networking.k8s.io/v1"
ENVOY_API = "gateway.envoyproxy.io/v1alpha1"
JUDGED = (
    (GATEWAY_API, "GatewayClass"),
    (GATEWAY_API, "Gateway"),
    (GATEWAY_API, "HTTPRoute"),
    (ENVOY_API, "ClientTrafficPolicy"),
    (ENVOY_API, "BackendTrafficPolicy"),
    (ENVOY_API, "EnvoyExtensionPolicy"),
)
CHAT = {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
QUICKSTART = {"Authorization": "Bearer sk-test123456"}
RICH = {"Authorization": "Bearer sk-rich"}
RICH_TOKEN = {
    "apiVersion": "arks.ai/v1",
    "kind": "ArksToken",
    "metadata": {"name": "rich", "namespace": TENANT},
    "spec": {"token": "sk-rich", "qos": [{"arksEndpoint": {"name": "qwen-7b"}}]},
}


@dataclass
class Serving:
    envoy: EnvoyGateway
    entrance: Path
    policy: Path
    state: Path
    engines: dict[int, Resident]
    extproc: Resident
    start_extproc: Any

    @property
    def ledger(self) -> Gateway:
        """Only what reads the ledger's file."""
        return Gateway("", "", self.state, self.policy, None, self.state)  # type: ignore[arg-type]


def slice_of(service: str, namespace: str, name: str, port: int, ready: bool = True) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-{port}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [ADDRESS], "conditions": {"ready": ready}}],
        "ports": [{"name": name, "port": port, "protocol": "TCP"}],
    }


def quickstart() -> list[Object]:
    found = list(yaml.safe_load_all((MANIFESTS / "samples" / "quickstart.yaml").read_text()))
    return [{**item, "metadata": {**item["metadata"], "namespace": TENANT}} for item in found] + [RICH_TOKEN]


def endpoint_objects(documents: list[Object]) -> list[Object]:
    """The route as the controller renders it, and the Service that an application has."""
    (endpoint,) = (item for item in documents if item["kind"] == "ArksEndpoint")
    made = desired_endpoint(ArksEndpoint.model_validate(endpoint), [Backend("app-qwen", 5, ready=2)])
    assert made.route is not None, made.problems
    route = {**made.route, "metadata": {**made.route["metadata"], "ownerReferences": []}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "arks-application-app-qwen", "namespace": TENANT},
        "spec": {"ports": [{"name": "http", "port": 8080, "targetPort": 8080}]},
    }
    return [service, route]


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    with KubeApi() as one:
        yield one


@pytest.fixture(scope="module")
def serving(api: KubeApi, product: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("eg")
    policy, state = folder / "policy", folder / "state"
    policy.mkdir()
    documents = quickstart()
    (policy / "policy.yaml").write_text(yaml.safe_dump_all(documents))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            envoy = stack.enter_context(EnvoyGateway(api, folder / "gateway"))
        except NoRoomError as error:
            pytest.skip(f"Envoy Gateway's ports and addresses need namespaces: {error}")
        api.apply(*(on_this_host(item) if item["kind"] == "EnvoyProxy" else item for item in product))
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TENANT}}, *documents)
        api.apply(slice_of("arks-extproc", "arks-system", "grpc", EXTPROC_PORT), *endpoint_objects(documents))
        for port in (PINNED, OTHER):
            api.apply(slice_of("arks-application-app-qwen", TENANT, "http", port))
        python = (sys.executable, "-m")

        def engine(port: int) -> Resident:
            flags = ("--model", "qwen-7b", "--itl-ms", "5", "--allow-fault-headers")
            command = [*python, "simengine", "--listen", f"{ADDRESS}:{port}", *flags]
            return envoy.room.spawn(command, folder / f"engine-{port}.log")

        def extproc() -> Resident:
            flags = ("--listen", f"{ADDRESS}:{EXTPROC_PORT}", "--admin", f"{ADDRESS}:{ADMIN_PORT}")
            folders = ("--policy", policy, "--state", state)
            # Envoy knows both engines, extproc only one: what reaches the other was not pinned.
            command = [*python, "arks", "extproc", *flags, *folders, "--engine", f"http://{ADDRESS}:{PINNED}"]
            return envoy.room.spawn([*command, "--drain-timeout-s", "1"], folder / "extproc.log")

        engines = {port: engine(port) for port in (PINNED, OTHER)}
        serving = Serving(envoy, Path(), policy, state, engines, extproc(), extproc)
        envoy.settle(JUDGED)
        serving.entrance = envoy.entrance(80)
        asyncio.run(_until_it_serves(serving))
        print(f"serves {time.monotonic() - began:.1f} s after Envoy Gateway's start")
        yield serving


async def _until_it_serves(serving: Serving) -> None:
    deadline = time.monotonic() + 30
    told = ""
    async with _session(serving) as session:
        while True:
            try:
                async with session.post("/v1/chat/completions", json=CHAT, headers=RICH) as answer:
                    told = f"{answer.status} {await answer.text()}"
                    if answer.status == 200:
                        return
            except aiohttp.ClientError as error:
                told = repr(error)
            assert time.monotonic() < deadline, told
            await asyncio.sleep(0.1)


def _session(serving: Serving) -> aiohttp.ClientSession:
    connector = aiohttp.UnixConnector(str(serving.entrance))
    return aiohttp.ClientSession("http://gateway", connector=connector, timeout=aiohttp.ClientTimeout(total=30))


@pytest.fixture
async def session(serving: Serving) -> AsyncIterator[aiohttp.ClientSession]:
    async with _session(serving) as one:
        yield one


async def ask(session: aiohttp.ClientSession, headers: dict[str, str], **body: Any) -> tuple[int, Any]:
    async with session.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers) as answer:
        return answer.status, json.loads(await answer.text())


async def engine_counter(serving: Serving, port: int) -> float:
    path = serving.envoy.room.reach(ADDRESS, port)
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession("http://engine", connector=connector) as session,
        session.get("/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:generation_tokens_total"))


async def test_a_plain_answer_comes_from_an_engine_with_its_usage(session):
    status, answer = await ask(session, RICH)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8


async def test_a_stream_comes_event_by_event_to_its_end(session):
    async with session.post("/v1/chat/completions", json={**CHAT, "stream": True}, headers=RICH) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        text = await answer.text()
    assert text.count("data: ") >= 9
    assert text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in text, "the client did not ask for it"


async def test_a_long_prompt_passes_the_buffer_that_is_32_kib_by_default(session):
    status, answer = await ask(session, RICH, messages=[{"role": "user", "content": "word " * 100_000}])
    assert status == 200, answer


async def test_a_body_over_50_mib_is_413_in_openais_shape(serving):
    length = 50 * 1024 * 1024 + 1
    reader, writer = await asyncio.open_unix_connection(serving.entrance)
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


async def test_the_quickstarts_sixth_request_in_a_minute_is_429(session):
    # The clock's minute may turn once in between: twelve requests do not fit into two.
    statuses = [(await ask(session, QUICKSTART))[0] for _ in range(12)]
    assert statuses.count(200) in range(5, 11)
    assert statuses.count(429) == 12 - statuses.count(200)


async def test_a_path_that_is_none_is_refused_by_extproc_not_routed(session):
    async with session.get("/metrics", headers=RICH) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "unknown_path")
    async with session.get("/v1/models", headers=RICH) as answer:
        assert [item["id"] for item in (await answer.json())["data"]] == ["qwen-7b"]


async def test_every_request_goes_to_the_engine_that_extproc_picked_and_to_no_other(serving, session):
    before = await engine_counter(serving, OTHER), await engine_counter(serving, PINNED)
    for _ in range(20):
        assert (await ask(session, RICH))[0] == 200
    assert await engine_counter(serving, OTHER) == before[0]
    assert await engine_counter(serving, PINNED) == before[1] + 20 * 8


async def test_a_clients_own_pin_and_route_headers_are_worth_nothing(serving, session):
    before = await engine_counter(serving, OTHER)
    forged = {PIN_HEADER: f"{ADDRESS}:{OTHER}", "model": "qwen-7b", "namespace": TENANT, "username": "rich"}
    assert (await ask(session, {**RICH, **forged}))[0] == 200
    assert (await ask(session, forged))[0] == 401
    async with session.get("/metrics", headers=forged) as answer:
        assert answer.status in {401, 404}
    assert await engine_counter(serving, OTHER) == before


async def test_a_client_that_left_and_an_engine_that_died_are_told_apart_by_the_access_log(serving, session):
    def error_of(request_id: str) -> str:
        rows = [
            row for row in serving.ledger.usage() if row["request_id"] == request_id and row["error"] != "broken_off"
        ]
        return rows[0]["error"] if rows else ""

    long = {**CHAT, "stream": True, "max_tokens": 2000}
    async with session.post("/v1/chat/completions", json=long, headers={**RICH, "x-request-id": "left"}) as answer:
        await answer.content.readline()
        answer.close()
    await until(lambda: bool(error_of("left")))
    assert error_of("left") == "client_disconnected"
    broken = {**RICH, "x-request-id": "died", "x-sim-fault": "reset_after_chunks=3"}
    with pytest.raises(aiohttp.ClientPayloadError):
        async with session.post("/v1/chat/completions", json=long, headers=broken) as answer:
            await answer.read()
    await until(lambda: bool(error_of("died")))
    assert error_of("died") == "engine_lost"


async def test_a_revoked_token_is_refused_while_an_open_stream_goes_on(serving, session):
    policy = serving.policy / "policy.yaml"
    text = policy.read_text()
    documents = [item for item in yaml.safe_load_all(text) if item["metadata"]["name"] != "rich"]
    try:
        long = {**CHAT, "stream": True, "max_tokens": 600}
        async with session.post("/v1/chat/completions", json=long, headers=RICH) as answer:
            await answer.content.readline()
            policy.with_name(".new").write_text(yaml.safe_dump_all(documents))
            policy.with_name(".new").replace(policy)
            async with asyncio.timeout(5):
                while (await ask(session, RICH))[0] != 401:  # noqa: ASYNC110 - another process decides
                    await asyncio.sleep(0.05)
            rest = await answer.text()
        assert rest.endswith("data: [DONE]\n\n")
    finally:
        policy.write_text(text)
        await _until_it_serves(serving)


async def test_without_extproc_nothing_passes(serving, session):
    before = await engine_counter(serving, PINNED), await engine_counter(serving, OTHER)
    serving.extproc.end()
    try:
        for headers in (RICH, {**RICH, "model": "qwen-7b", "namespace": TENANT}):
            async with session.post("/v1/chat/completions", json=CHAT, headers=headers) as answer:
                assert answer.status == 503
        assert (await engine_counter(serving, PINNED), await engine_counter(serving, OTHER)) == before
    finally:
        serving.extproc = serving.start_extproc()
        await _until_it_serves(serving)


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


async def over_tls(path: Path, host: str) -> tuple[int, bytes]:
    """Status of a chat there, and what certificate answered."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_unix_connection(path, ssl=context, server_hostname=host)
    body = json.dumps(CHAT).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\nauthorization: Bearer sk-rich\r\n\r\n" + body)
    try:
        async with asyncio.timeout(5):
            answer = await reader.readline()
        return int(answer.split(maxsplit=2)[1]), writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()


async def test_each_tenant_has_a_domain_a_certificate_and_only_its_own_models_there(serving, api, tmp_path):
    """The last one: it takes the Gateway's listeners over, as the example says."""
    api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}})
    api.apply(*certificates(tmp_path / "certificates"), MANIFESTS / "gateway" / "examples" / "tenants.yaml")
    serving.envoy.settle(JUDGED)
    path = serving.envoy.entrance(443)
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            status, first = await over_tls(path, "team-a.models.example.com")
            if status == 200:
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    status, second = await over_tls(path, "team-b.models.example.com")
    # Admitted, for the token is good everywhere; but the tenant's model has no route on the neighbour's domain.
    assert status == 503
    assert first != second
    async with _session(serving) as session:
        with pytest.raises(aiohttp.ClientError):
            await ask(session, RICH)
