"""A cluster with everybody's CRDs, a controller on it, and something to wait with."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.app import Controller
from controller.kube.client import WRITE_VERBS, Client
from controller.kube.credentials import from_kubeconfig
from controller.settings import ControllerSettings
from tests.harness.actor import Actor
from tests.harness.envoy_gateway import custom_resources
from tests.harness.hearing import behind
from tests.harness.kubernetes import KubeApi, KubeError, Object
from tests.reconcile.resources import GATEWAY

CRDS = Path(__file__).parents[2] / "manifests" / "crds"
STAND_INS = Path(__file__).parents[1] / "harness" / "crds"
TIMEOUT_S = 90.0
HASTY = {"lease_s": 3.0, "renew_s": 2.0, "retry_s": 0.3}
"""of a Lease that is to be lost soon"""


def gateway_kinds() -> list[Object]:
    wanted = {"httproutes", "gateways", "gatewayclasses"}
    return [crd for crd in custom_resources("gateway-api") if crd["spec"]["names"]["plural"] in wanted]


@pytest.fixture(scope="session")
def cluster(kube_cluster: KubeApi) -> KubeApi:
    """Kubernetes with its controllers, our CRDs, Gateway API, and stand-ins for LWS and RBG."""
    kube_cluster.apply(CRDS, STAND_INS, *gateway_kinds())
    return kube_cluster


class Room:
    """One namespace, seen as a user sees it. Calls are quick and synchronous; waiting is not."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.api, self.namespace = api, namespace
        self.secret = f"sk-{namespace}"

    def apply(self, *texts: str | Object, **changes: Any) -> list[Object]:
        """`changes` are merged into the spec of each object; GATEWAYS stands for this namespace.

        Secrets of tokens are this namespace's own: a tenant's token would count as another's duplicate.
        """
        applied = []
        for text in texts:
            filled = text
            if isinstance(text, str):
                filled = text.replace("GATEWAYS", self.namespace).replace("sk-test123456", self.secret)
            trees = list(yaml.safe_load_all(filled)) if isinstance(filled, str) else [copy.deepcopy(filled)]
            for tree in filter(None, trees):
                merge(tree.setdefault("spec", {}), changes)
                tree["metadata"]["namespace"] = self.namespace
                applied += self.api.apply(tree)
        return applied

    def get(self, kind: str, name: str) -> Object:
        return self.api.get(VERSIONS.get(kind, "arks.ai/v1"), kind, name, self.namespace)

    def find(self, kind: str, name: str) -> Object | None:
        try:
            return self.get(kind, name)
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str) -> list[Object]:
        return self.api.list(VERSIONS.get(kind, "arks.ai/v1"), kind, self.namespace)

    def patch(self, kind: str, name: str, patch: Any) -> Object:
        path = f"{self.api.path(VERSIONS.get(kind, 'arks.ai/v1'), kind, self.namespace)}/{name}"
        found: Object = self.api.request("PATCH", path, patch, content_type="application/merge-patch+json")
        return found

    def delete(self, kind: str, name: str) -> None:
        self.api.delete(VERSIONS.get(kind, "arks.ai/v1"), kind, name, self.namespace)

    def events(self, name: str) -> list[tuple[str, str]]:
        found = self.api.list("v1", "Event", self.namespace)
        return [(each["type"], each["reason"]) for each in found if each["involvedObject"]["name"] == name]

    async def until(self, kind: str, name: str, wanted: Callable[[Object], Any], what: str = "") -> Object:
        """Wait until the object is there and `wanted` of it is true. What it looks for may not be there yet."""
        seen: list[Object | None] = [None]
        lacking: list[Exception | None] = [None]

        def there() -> Object | None:
            seen[0], lacking[0] = self.find(kind, name), None
            try:
                return seen[0] if seen[0] is not None and wanted(seen[0]) else None
            except (LookupError, TypeError) as error:
                lacking[0] = error
                return None

        try:
            found = await wait_for(there)
        except TimeoutError:
            status = (seen[0] or {}).get("status")
            raise AssertionError(f"{kind} {name} never: {what or wanted}; it says {status}") from lacking[0]
        assert found is not None
        return found

    async def condition(self, kind: str, name: str, type_: str, status: str, reason: str = "") -> Object:
        """Wait for a condition; returns it."""
        found = await self.until(
            kind,
            name,
            lambda item: (
                (c := condition(item, type_)) and c["status"] == status and (not reason or c["reason"] == reason)
            ),
            f"{type_}={status} {reason}",
        )
        return condition(found, type_)

    async def event(self, name: str, type_: str, reason: str) -> None:
        await wait_for(lambda: (type_, reason) in self.events(name))

    async def phase(self, kind: str, name: str, phase: str) -> Object:
        return await self.until(kind, name, lambda item: item.get("status", {}).get("phase") == phase, f"phase {phase}")

    async def gone(self, kind: str, name: str) -> None:
        """The cluster's collector takes up to half a minute to know a kind that was installed just now."""
        await wait_for(lambda: self.find(kind, name) is None, 120.0)


VERSIONS = {
    "Deployment": "apps/v1",
    "Event": "v1",
    "Gateway": "gateway.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "Job": "batch/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "Lease": "coordination.k8s.io/v1",
    "PersistentVolumeClaim": "v1",
    "Pod": "v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "RoleBasedGroup": "workloads.x-k8s.io/v1alpha2",
    "RoleBasedGroupSet": "workloads.x-k8s.io/v1alpha2",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "Secret": "v1",
    "Service": "v1",
    "ServiceAccount": "v1",
}


def merge(tree: Object, changes: Object) -> None:
    for key, value in changes.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def condition(item: Object, type_: str) -> Object | None:
    found = item.get("status", {}).get("conditions") or ()
    return next((each for each in found if each["type"] == type_), None)


async def wait_for(check: Callable[[], Any], timeout_s: float = TIMEOUT_S, what: str = "") -> Any:
    """The first true answer. The call is made in a thread: the controller shares this loop."""
    until = time.monotonic() + timeout_s
    while True:
        found = await asyncio.to_thread(check)
        if found:
            return found
        if time.monotonic() > until:
            raise TimeoutError(f"never: {what}" if what else "never became true")
        await asyncio.sleep(0.05)


@pytest.fixture
def room(cluster: KubeApi) -> Iterator[Room]:
    name = cluster.create_namespace()
    yield Room(cluster, name)
    cluster.remove_namespace(name)


class Running:
    """A controller in this process. `stop()` and `start()` are a restart.

    Its Lease is as long as outside: who was starved for some seconds leads on. `HASTY` is for who shall lose it.
    """

    def __init__(self, api: KubeApi, namespace: str, **changes: Any) -> None:
        settings = ControllerSettings(
            namespace=namespace,
            environment={},
            retry_s=0.5,
            discovery_s=0.3,
        )
        self._api, self.settings = api, replace(settings, **changes)
        self._stack = contextlib.AsyncExitStack()
        self._task: asyncio.Task[None] | None = None
        self.controller: Controller
        self.client: Client

    async def start(self, server: str | None = None, user: str = "admin") -> None:
        config = self._api.kubeconfig(user, server=server)
        self.client = await self._stack.enter_async_context(Client(from_kubeconfig(str(config))))
        self.controller = Controller(self.client, self.settings)
        self._task = asyncio.create_task(self.controller.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._stack.aclose()
        # TLS connections of broken-off watches say good-bye; the loop must run for that.
        await asyncio.sleep(0.05)

    async def leading(self) -> None:
        await _until(lambda: self.controller.reconciler is not None and self.controller.lease.is_leader)

    async def quiet(self, for_s: float = 0.4) -> None:
        """Wait until we and all actors have heard of everything and have done, and said, all that follows from it."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.leading()
            since = time.monotonic()
            while True:
                await asyncio.sleep(0.02)
                if self._busy():
                    since = time.monotonic()
                elif time.monotonic() - since >= for_s:
                    behind = await asyncio.to_thread(self._behind)
                    if not behind and not self._busy():
                        return
                    since = time.monotonic()

    def _busy(self) -> bool:
        queue, events = self.controller.reconciler.queue, self.controller.events
        telling = events._sending is not None or not events._waiting.empty()
        return bool(queue.depth or queue.in_flight or telling) or not all(actor.idle for actor in self._actors())

    def _behind(self) -> list[str]:
        kinds = behind(self._api, list(self.controller.watches.reflectors.values()))
        return [*kinds, *(kind for actor in self._actors() for kind in actor.behind())]

    def _actors(self) -> list[Actor]:
        return [actor for actor in Actor.acting if actor.api is self._api]

    def writes(self) -> Counter[tuple[str, ...]]:
        """Writes sent so far, but for the Lease, by what was written."""
        calls = self.client.stats.calls.items()
        return Counter({call: count for call, count in calls if call[0] in WRITE_VERBS and call[2] != "leases"})


async def _until(check: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 - whatever it is, it has no event
            await asyncio.sleep(0.02)


@pytest.fixture
async def running(room: Room) -> AsyncIterator[Running]:
    """A controller that leads."""
    found = Running(room.api, room.namespace)
    await found.start()
    try:
        await found.leading()
        yield found
    finally:
        await found.stop()


@pytest.fixture
async def actor(room: Room) -> AsyncIterator[Actor]:
    async with Actor(room.api, room.namespace) as found:
        yield found


@pytest.fixture
def gateway(room: Room) -> Object:
    return room.apply(GATEWAY)[0]
