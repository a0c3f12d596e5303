"""5 000 tokens and 500 endpoints, applied as fast as the API server takes them, on the controller as it ships.

The suite's short form makes a fifth of them; `make test-faults` all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.actor import ROUTES, Actor
from tests.harness.kubernetes import KubeApi, Object
from tests.reconcile.conftest import Room, condition, wait_for
from tests.reconcile.faults.conftest import furnish
from tests.reconcile.faults.process import ControllerProcess
from tests.reconcile.faults.world import accepted, made_twice, still, writes
from tests.reconcile.resources import GATEWAY, QUOTA

pytestmark = pytest.mark.timeout(600)

TOKENS, ENDPOINTS = (5_000, 500) if os.environ.get("ARKS_FAULTS") == "1" else (1_000, 100)
USERS = 16
DEADLINE_S = 300.0
RSS_MB = 300.0  # of the 512 that its pod is limited to


@pytest.fixture
def hall(built: None) -> Iterator[Room]:
    """On a server of its own: to remove thousands of objects takes longer than to make them."""
    with KubeApi(audit=True) as api:
        furnish(api)
        yield Room(api, api.create_namespace())


async def test_every_one_is_served_once_and_then_all_is_still(hall: Room, tmp_path: Path):
    stream = f"unix:{tmp_path / 'policy.sock'}"
    process = ControllerProcess(hall.api, tmp_path, real=True, policy_stream=stream)
    try:
        async with Actor(hall.api, hall.namespace, kinds=(ROUTES,)):
            await wait_for(lambda: process.leads)
            await asyncio.to_thread(hall.apply, GATEWAY, QUOTA)
            for kind in ("Gateway", "ArksQuota"):
                await wait_for(lambda kind=kind: process.metric("arks_controller_objects", kind=kind) == 1)
            await still(hall)
            before_mb, cpu_s, mark, began = process.rss_mb(), process.cpu_s(), hall.api.audit.mark(), time.time()
            await asyncio.to_thread(create, hall)
            created_s = time.time() - began
            await still(hall, timeout_s=DEADLINE_S)
            await wait_for(lambda: all_right(hall), DEADLINE_S)
        await still(hall)
        assert all_right(hall)
        assert process.running
        assert process.get("/healthz") == process.get("/readyz") == (200, "ok")
        await wait_for(lambda: process.metric("arks_controller_queue_depth") == 0)
        await wait_for(lambda: process.metric("arks_controller_objects", kind="ArksToken") == TOKENS)
        assert process.metric("arks_controller_passes_total", outcome="failed") == 0
        assert not process.tracebacks()
        written = [each for each in writes(hall, mark) if each.namespace == hall.namespace]
        assert not made_twice(written)
        sent = Counter((each.resource, each.subresource) for each in written)
        counts = {
            each: Counter((write.resource, write.name) for write in written if write.resource == each)
            for each, _ in sent
        }
        # A token that is seen before its endpoint says so first. A route is applied once, and its endpoint says twice
        # how it stands: the route is made, the Gateway carries it.
        assert set(sent) == {("arkstokens", "status"), ("arksendpoints", "status"), ("httproutes", "")}
        assert len(counts["arkstokens"]) == TOKENS
        assert max(counts["arkstokens"].values()) <= 2
        assert len(counts["arksendpoints"]) == ENDPOINTS
        assert max(counts["arksendpoints"].values()) <= 2
        assert sent["httproutes", ""] == ENDPOINTS
        assert process.rss_mb(peak=True) < RSS_MB
        print(
            f"created in {created_s:.1f} s, all written {written[-1].answered_s - began - created_s:.1f} s later; "
            f"controller: {process.cpu_s() - cpu_s:.1f} s of CPU, {before_mb:.0f} MB before, "
            f"{process.rss_mb():.0f} after, {process.rss_mb(peak=True):.0f} at most; {dict(sent)}"
        )
    finally:
        assert process.end() == 0


def create(hall: Room) -> None:
    """Plain POSTs by many users, in no order."""
    bodies = [token(number) for number in range(TOKENS)] + [endpoint(number) for number in range(ENDPOINTS)]
    random.Random(7).shuffle(bodies)
    paths = {kind: hall.api.path("arks.ai/v1", kind, hall.namespace) for kind in ("ArksToken", "ArksEndpoint")}
    with concurrent.futures.ThreadPoolExecutor(USERS) as pool:
        list(pool.map(lambda body: hall.api.request("POST", paths[body["kind"]], body), bodies))


def token(number: int) -> Object:
    limits = [{"type": "rpm", "value": 60}, {"type": "tpm", "value": 40_000}]
    grant = {
        "arksEndpoint": {"name": f"endpoint-{number % ENDPOINTS}"},
        "rateLimits": limits,
        "quota": {"name": "basic-quota"},
    }
    return ours("ArksToken", f"token-{number}", token=f"sk-of-many-{number:05}", qos=[grant])


def endpoint(number: int) -> Object:
    backend = {"name": f"engine-{number}", "port": 8000}
    return ours("ArksEndpoint", f"endpoint-{number}", gatewayRef={"name": "arks-eg"}, routeConfigs=[backend])


def ours(kind: str, name: str, **spec: object) -> Object:
    return {"apiVersion": "arks.ai/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def all_right(hall: Room) -> bool:
    endpoints = hall.list("ArksEndpoint")
    if len(endpoints) != ENDPOINTS or not all(accepted(each) and _programmed(each) for each in endpoints):
        return False
    backends = {each["metadata"]["name"]: _backends(each) for each in hall.list("HTTPRoute")}
    if backends != {f"endpoint-{number}": [f"engine-{number}"] for number in range(ENDPOINTS)}:
        return False
    tokens = hall.list("ArksToken")
    return len(tokens) == TOKENS and all(map(accepted, tokens))


def _programmed(item: Object) -> bool:
    return (condition(item, "Programmed") or {}).get("status") == "True"


def _backends(route: Object) -> list[str]:
    return [each["name"] for rule in route["spec"]["rules"] for each in rule["backendRefs"]]
