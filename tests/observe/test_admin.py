"""The admin port tells the truth in every state of the process."""

import aiohttp
import pytest

from extproc.http.admin import AdminServer, Check
from extproc.observe.metrics import CONTENT_TYPE, GatewayMetrics


class State:
    def __init__(self):
        self.policy = Check(ok=False, detail={"error": "no policy yet"})
        self.engines = Check(ok=False, detail={"healthy": 0}, required=False)
        self.draining = Check(ok=True)


@pytest.fixture
async def served():
    state = State()
    checks = {"policy": lambda: state.policy, "engines": lambda: state.engines, "draining": lambda: state.draining}
    metrics = GatewayMetrics()
    server = AdminServer(metrics, checks)
    await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://{server.address}") as client:
        yield state, metrics, client
    await server.close()


async def ready(client):
    async with client.get("/readyz") as answer:
        return answer.status, await answer.json()


async def test_unready_until_the_first_policy_and_while_draining(served):
    state, _, client = served
    assert (await ready(client))[0] == 503
    async with client.get("/healthz") as answer:
        assert answer.status == 200
    state.policy = Check(ok=True, detail={"version": 1})
    status, told = await ready(client)
    assert (status, told["ready"]) == (200, True)
    state.draining = Check(ok=False, detail={"open_streams": 3})
    status, told = await ready(client)
    assert (status, told["checks"]["draining"]) == (503, {"ok": False, "open_streams": 3})


async def test_a_broken_file_after_a_good_policy_is_told_without_taking_the_gateway_away(served):
    state, _, client = served
    error = {"file": "tokens.yaml", "line": 7, "field": "spec.qos"}
    state.policy = Check(ok=True, detail={"version": 3, "error": error})
    status, told = await ready(client)
    assert status == 200
    assert told["checks"]["policy"]["error"] == error


async def test_a_check_that_raises_is_not_ready_and_not_a_crash():
    server = AdminServer(GatewayMetrics(), {"journal": lambda: 1 / 0})
    await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as other, other.get(f"http://{server.address}/readyz") as answer:
        told = await answer.json()
    await server.close()
    assert answer.status == 503
    assert told["checks"]["journal"] == {"ok": False, "error": "ZeroDivisionError"}


async def test_metrics_are_served_as_prometheus_expects(served):
    _, metrics, client = served
    metrics.refused("", "token_missing")
    async with client.get("/metrics") as answer:
        text = await answer.text()
    assert answer.headers["content-type"] == CONTENT_TYPE
    assert 'arks_refused_requests_total{namespace="",reason="token_missing"} 1' in text


async def test_other_paths_and_methods_are_refused(served):
    _, _, client = served
    async with client.get("/v1/models") as answer:
        assert answer.status == 404
    async with client.post("/readyz", data=b"x" * 100_000) as answer:
        assert answer.status == 405


async def test_a_taken_port_is_an_error_not_a_silent_share(served):
    _, _, client = served
    port = client._base_url.port
    with pytest.raises(OSError, match="address already in use"):
        await AdminServer(GatewayMetrics(), {}).start("127.0.0.1", port)
