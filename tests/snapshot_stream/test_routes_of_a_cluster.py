"""What stands behind an endpoint, from a real API server's objects to the addresses and weights extproc is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from apis.policy import Endpoint
from controller.kube.client import WRITE_VERBS, Client
from controller.kube.credentials import from_kubeconfig
from controller.kube.discovery import Discovery
from controller.reconcile.watches import Watches
from controller.snapshot.publisher import Publisher
from controller.weights.model import EngineLoad
from tests.harness.kubernetes import KubeApi
from tests.snapshot_stream.conftest import Tenant
from tests.snapshot_stream.world import Following, until


class Cluster:
    def __init__(self, following: Following, publisher: Publisher, client: Client, namespace: str) -> None:
        self.following, self.publisher, self.client, self._namespace = following, publisher, client, namespace

    def endpoint(self, name: str = "qwen") -> Endpoint | None:
        return self.following.policy.endpoints.get((self._namespace, name))

    def routes(self, name: str = "qwen") -> dict[str, tuple[int, tuple[str, ...]]] | None:
        found = self.endpoint(name)
        if found is None or found.routes is None:
            return None
        return {route.name: (route.weight, route.addresses) for route in found.routes}

    async def shows(self, routes: dict[str, tuple[int, tuple[str, ...]]] | None) -> None:
        try:
            await until(lambda: self.endpoint() is not None and self.routes() == routes)
        except TimeoutError:
            raise AssertionError(f"it stays at {self.routes()}") from None


@pytest.fixture
async def cluster(api: KubeApi, tenant: Tenant, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A publisher and a follower in this loop, over a real socket, on the test's own namespace."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(from_kubeconfig(str(api.kubeconfig()))))
        discovery = Discovery(client, interval_s=0.3)
        watches = Watches(client, discovery)
        following = Following(tmp_path)
        publisher = Publisher(client, discovery, watches, following.address)
        tasks = [asyncio.create_task(work()) for work in (discovery.run, watches.run, publisher.run)]
        try:
            await stack.enter_async_context(following.running())
            yield Cluster(following, publisher, client, tenant.namespace)
            assert not [task for task in tasks if task.done()]
            assert not [verb for verb, *_ in client.stats.calls if verb in WRITE_VERBS], "publishing writes"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_services_that_users_name_lead_to_their_ready_pods(cluster: Cluster, tenant: Tenant):
    tenant.endpoint(routeConfigs=[{"name": "vllm", "port": 80, "weight": 3}])
    await cluster.shows({"vllm": (3, ())})
    tenant.service("vllm", 80)
    tenant.slice("vllm", "10.0.0.1", "10.0.0.2", unready=("10.0.0.3",))
    await cluster.shows({"vllm": (3, ("10.0.0.1:8080", "10.0.0.2:8080"))})
    tenant.slice("vllm", "10.0.0.2")
    await cluster.shows({"vllm": (3, ("10.0.0.2:8080",))})
    tenant.slice("vllm")
    await cluster.shows({"vllm": (3, ())})
    tenant.slice("vllm", "10.0.0.4")
    await cluster.shows({"vllm": (3, ("10.0.0.4:8080",))})
    tenant.delete("Service", "vllm", "v1")
    await cluster.shows({"vllm": (3, ())})


async def test_backends_of_envoy_gateway_lead_to_engines_outside(cluster: Cluster, tenant: Tenant):
    group = "gateway.envoyproxy.io"
    names = ("outside", "named")
    tenant.endpoint(routeConfigs=[{"group": group, "kind": "Backend", "name": name, "weight": 1} for name in names])
    by_ip, by_name = {"ip": {"address": "192.0.2.7", "port": 8000}}, {"fqdn": {"hostname": "localhost", "port": 8001}}
    for name, end in zip(names, (by_ip, by_name), strict=True):
        tenant.apply(f"{group}/v1alpha1", "Backend", name, spec={"endpoints": [end]})
    await until(lambda: (cluster.routes() or {}).get("outside") == (1, ("192.0.2.7:8000",)))
    await until(lambda: "127.0.0.1:8001" in cluster.routes()["named"][1])
    tenant.delete("Backend", "outside", f"{group}/v1alpha1")
    await until(lambda: cluster.routes()["outside"] == (1, ()))


async def test_applications_are_found_by_the_model_they_serve(cluster: Cluster, tenant: Tenant):
    tenant.endpoint(defaultWeight=5, weightPolicy="capacity")
    await cluster.shows(None)
    tenant.application("app", "qwen", 0)
    await cluster.shows({})
    tenant.service("arks-application-app")
    tenant.slice("arks-application-app", "10.0.0.1")
    tenant.application("app", "qwen", 2)
    await cluster.shows({"arks-application-app": (10, ("10.0.0.1:8080",))})
    tenant.endpoint(defaultWeight=5, weightPolicy="static")
    await cluster.shows({"arks-application-app": (5, ("10.0.0.1:8080",))})
    tenant.application("app", "another", 2)
    await cluster.shows(None)
    tenant.delete("ArksEndpoint", "qwen")
    await until(lambda: cluster.endpoint() is None)


async def test_the_load_policys_weights_reach_extproc_and_dead_engines_lose_theirs(cluster: Cluster, tenant: Tenant):
    for app, address in (("one", "192.0.2.1"), ("two", "192.0.2.2")):
        tenant.service(f"arks-application-{app}")
        tenant.slice(f"arks-application-{app}", address)
        tenant.application(app, "qwen", 1)
    # A backend that is heard of later than its endpoint would begin with little.
    known = cluster.publisher._watches.applications
    await until(lambda: all((tenant.namespace, app) in known for app in ("one", "two")))
    tenant.endpoint(weightPolicy="load")
    names = ("arks-application-one", "arks-application-two")
    await until(lambda: (cluster.routes() or {}).keys() == set(names))
    assert {cluster.routes()[name][0] for name in names} == {100}
    loads = cluster.publisher.loads

    async def sweep(_addresses):
        loads.scraper.loads = {
            "192.0.2.1:8080": EngineLoad("192.0.2.1:8080", healthy=False),
            "192.0.2.2:8080": EngineLoad("192.0.2.2:8080", healthy=True, running=3),
        }
        return loads.scraper.loads

    loads.scraper.sweep = sweep
    await until(lambda: [cluster.routes()[name][0] for name in names] == [0, 100])
    await until(lambda: cluster.following.source.loads.get("192.0.2.2:8080", (0,))[0] == 3)
    assert not cluster.following.source.loads["192.0.2.1:8080"].healthy


async def test_a_malformed_object_keeps_the_others_coming(cluster: Cluster, tenant: Tenant):
    """A slice that our types refuse is skipped; an unreadable token must not stay valid."""
    tenant.endpoint(routeConfigs=[{"name": "vllm", "port": 80}])
    tenant.service("vllm", 80)
    tenant.slice("vllm", "10.0.0.1")
    tenant.token("alice", "sk-alice")
    await cluster.shows({"vllm": (1, ("10.0.0.1:8080",))})
    await until(lambda: (tenant.namespace, "alice") in cluster.following.policy.tokens)
    watched = cluster.publisher._watches.reflectors["ArksToken"]
    decode, watched._decode = watched._decode, lambda _raw: 1 / 0
    tenant.token("alice", "sk-changed")
    await until(lambda: (tenant.namespace, "alice") not in cluster.following.policy.tokens)
    watched._decode = decode
    tenant.slice("vllm", "10.0.0.9")
    await cluster.shows({"vllm": (1, ("10.0.0.9:8080",))})
    tenant.token("alice", "sk-again")
    await until(lambda: (tenant.namespace, "alice") in cluster.following.policy.tokens)
