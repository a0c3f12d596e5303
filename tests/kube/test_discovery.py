"""Which kinds are served is known from one request, and a kind installed later is noticed."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest
from aiohttp import web

from controller.kube.discovery import Discovery
from controller.kube.errors import KubeError
from controller.kube.resource import DEPLOYMENTS, LEASES, PODS
from tests.harness.kubernetes import KubeApi
from tests.harness.tcp_proxy import TcpProxy
from tests.kube.conftest import PEAR_CRD, PEARS, Connect, running, until
from tests.kube.test_watching_with_faults import Scripted


async def test_built_in_and_custom_kinds_are_found(pears: KubeApi, connect: Connect) -> None:
    client = await connect(pears.kubeconfig("u8"))  # no rights at all
    discovery = Discovery(client)
    assert await discovery.refresh()
    async with asyncio.timeout(60):  # what others have installed, or removed, just now
        while discovery.find("kube.test", "Pear") is None or await discovery.refresh():
            await discovery.refresh()
    assert discovery.find("", "Pod") == PODS
    assert discovery.find("apps", "Deployment") == DEPLOYMENTS
    assert discovery.find("coordination.k8s.io", "Lease", ["v9", "v1"]) == LEASES
    assert discovery.find("coordination.k8s.io", "Lease", ["v9"]) is None
    assert discovery.find("kube.test", "Pear") == PEARS
    assert discovery.find("leaderworkerset.x-k8s.io", "LeaderWorkerSet") is None
    assert client.stats.calls["get", "", "/apis", "304"] >= 1


async def test_a_kind_that_comes_changes_its_version_and_goes_is_told(kube_api: KubeApi, connect: Connect) -> None:
    crd = copy.deepcopy(PEAR_CRD)
    crd["metadata"]["name"] = "figs.figs.test"
    crd["spec"] |= {"group": "figs.test", "names": {"plural": "figs", "kind": "Fig"}}
    crd["spec"]["versions"].append(crd["spec"]["versions"][0] | {"name": "v1alpha1", "storage": False})
    told = 0

    def changed() -> None:
        nonlocal told
        told += 1

    discovery = Discovery(await connect(kube_api.kubeconfig()), interval_s=0.1)
    discovery.subscribe(changed)
    async with running(discovery.run):
        await discovery.ready.wait()
        assert discovery.find("figs.test", "Fig") is None
        kube_api.apply(crd)
        await until(lambda: discovery.find("figs.test", "Fig"))
        both = discovery.find("figs.test", "Fig", ["v1alpha1"])
        assert both is not None
        assert both.version == "v1alpha1"
        crd["spec"]["versions"].pop()
        kube_api.apply(crd)
        await until(lambda: discovery.find("figs.test", "Fig", ["v1alpha1"]) is None)
        assert discovery.find("figs.test", "Fig") is not None
        kube_api.request("DELETE", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/figs.figs.test")
        await until(lambda: discovery.find("figs.test", "Fig") is None)
    assert told >= 4


async def test_through_an_outage_the_last_answer_stands(kube_api: KubeApi, connect: Connect) -> None:
    async with TcpProxy(kube_api.port) as proxy:
        discovery = Discovery(await connect(kube_api.kubeconfig(server=proxy.url)))
        await discovery.refresh()
        proxy.refuse()
        with pytest.raises(KubeError):
            await discovery.refresh()
        assert discovery.find("", "Pod") == PODS


async def test_an_aggregated_api_that_is_away_keeps_its_kinds(connect: Connect, tmp_path: Path) -> None:
    def groups(*versions: dict[str, object]) -> web.Response:
        items = [{"metadata": {"name": "g.io"}, "versions": list(versions)}] if versions else []
        return web.json_response({"kind": "APIGroupDiscoveryList", "items": items})

    served = [{"resource": "things", "scope": "Namespaced", "responseKind": {"kind": "Thing"}}]
    server = Scripted(
        groups(),
        groups({"version": "v1", "resources": served}),
        groups(),
        groups({"version": "v1", "freshness": "Stale"}),
        groups(),
        groups(),
    )
    async with server.serving(tmp_path) as config:
        discovery = Discovery(await connect(config))
        await discovery.refresh()
        assert discovery.find("g.io", "Thing") is not None
        assert not await discovery.refresh()
        assert discovery.find("g.io", "Thing") is not None
        assert await discovery.refresh()
        assert discovery.find("g.io", "Thing") is None
