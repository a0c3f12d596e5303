"""Publisher: from the controller's watches to the stream that extproc follows.

It reads the stores of `Watches` and adds its own watches of what stands behind routes: all Services, EndpointSlices,
and Envoy Gateway's Backends where they are served (list and watch in all namespaces; tenants name them freely). Nothing
is told before every one of them has been seen whole: half a picture would revoke what the other half grants. Every
replica publishes, leader or not. Life cycle: `run()` is a task of the owner, beside the same watches' `run()`.

Changes wait `window_s` for each other, then become generations of at most `PART_RECORDS` records, with the loop free in
between. A dying publisher tells nothing: its followers keep what they have and say how old it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import structlog

from apis.fragments import BackendFragment, ServiceFragment, SliceFragment
from apis.resources import ArksEndpoint
from apis.resources.kubernetes import Backend as BackendResource
from apis.resources.kubernetes import EndpointSlice, Service
from apis.wire.snapshot_pb2 import EngineLoad as WireLoad
from apis.wire.snapshot_pb2 import FollowResponse, Load, ReportRequest
from controller.kube.client import Client, Decode
from controller.kube.discovery import Discovery
from controller.kube.errors import ForbiddenError
from controller.kube.reflector import Reflector
from controller.kube.resource import SERVICES, Key, Resource
from controller.kube.store import Store
from controller.reconcile.desired.endpoint import Backend
from controller.reconcile.spending import Spending
from controller.reconcile.watches import Watches
from controller.snapshot.compiled import Addresses, Compiled
from controller.snapshot.decoding import fragments
from controller.snapshot.feed import PART_RECORDS, Feed
from controller.snapshot.server import PolicyServer
from controller.weights.following import LoadFollower
from controller.weights.model import EngineLoad

T = TypeVar("T")

ENDPOINT_SLICES: Final = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
BACKENDS: Final = ("gateway.envoyproxy.io", "Backend", ("v1alpha1",))
WINDOW_S: Final = 0.005
_NO_LOADS: Final = FollowResponse(load=Load()).SerializeToString()
_POLICY_KINDS: Final = ("ArksToken", "ArksQuota", "ArksEndpoint", "Secret")

_log = structlog.get_logger(__name__)


class Publisher:
    """`address`: unix:PATH, or HOST:PORT on loopback. After `listening` is set, `address` holds the real port."""

    def __init__(
        self,
        client: Client,
        discovery: Discovery,
        watches: Watches,
        address: str,
        *,
        window_s: float = WINDOW_S,
        follower: LoadFollower | None = None,
        spending: Spending | None = None,
    ) -> None:
        self.address = address
        self.feed = Feed()
        self.listening, self.ready = asyncio.Event(), asyncio.Event()
        """the stream can be followed; it tells the whole policy"""
        self._client, self._discovery, self._watches, self._window_s = client, discovery, watches, window_s
        self._addresses = Addresses()
        self._compiled = Compiled(watches, self._addresses, self._weigh_now)
        self.loads = follower or LoadFollower(watches.endpoints.get, self._compiled.engines)
        self._told: dict[str, tuple[EngineLoad, bytes]] = {}
        """each engine's load, and how it was told"""
        self._spending = Spending() if spending is None else spending
        self._gone: set[Key] = set()
        """quotas that were deleted, until their followers are told"""
        self._stale = asyncio.Event()
        self._reflectors: dict[str, Reflector[Any]] = {}
        self._discovered = asyncio.Event()
        self._discovered.set()
        self._reflect(SERVICES, self._addresses.services, fragments(Service, ServiceFragment))
        self._reflect(ENDPOINT_SLICES, self._addresses.slices, fragments(EndpointSlice, SliceFragment))

    # -- for the reconcilers --------------------------------------------------------------------------------------

    def weigh(self, endpoint: ArksEndpoint, backends: Sequence[Backend]) -> Sequence[Backend]:
        """`reconcile.context.Weigh`: the weights that an endpoint's HTTPRoute shall have."""
        return self.loads.weigh_route(endpoint, backends)

    def on_route_weights(self, changed: Callable[[Key], None]) -> None:
        """Call `changed(endpoint's key)` when `weigh` would answer so differently that it is worth a write."""
        self.loads.subscribe(route=changed)

    def unready(self) -> list[str]:
        """What is still missing before anything is told."""
        return [] if self.ready.is_set() else self._missing() or ["the policy is being compiled"]

    @property
    def view_age_s(self) -> float:
        """For how long the cluster has not been followed, by the kind that fares worst."""
        ours = [self._watches.reflectors[kind] for kind in _POLICY_KINDS if kind in self._watches.reflectors]
        return max(each.outage_s for each in (*ours, *self._reflectors.values()))

    # -- life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Listen at once, tell when the picture is whole, follow until cancelled.

        Raises OSError where `address` cannot be had.
        """
        self._watches.subscribe(self._changed, _malformed)
        self.loads.subscribe(shares=self._reweighed, loads=self._tell_loads)
        server = PolicyServer(
            self.feed,
            self.address,
            ready=self.ready,
            view_age_s=lambda: self.view_age_s,
            on_report=self._reported,
        )
        try:
            async with server, asyncio.TaskGroup() as group:
                self.address = server.address
                self.listening.set()
                for reflector in list(self._reflectors.values()):
                    group.create_task(reflector.run(), name=f"watch {reflector.resource} for the stream")
                group.create_task(self._follow_backends(group), name="watch backends, once served")
                await self._complete()
                began = asyncio.get_running_loop().time()
                self._compiled.touch_all()
                while len(self._compiled):
                    self.feed.change(self._compiled.take(PART_RECORDS))
                    await asyncio.sleep(0)
                self.ready.set()
                took_s = asyncio.get_running_loop().time() - began
                _log.info("publishing policy", records=len(self.feed), address=self.address, took_s=round(took_s, 3))
                group.create_task(self.loads.run(), name="engine load")
                await self._publish()
        finally:
            self._watches.unsubscribe(self._changed, _malformed)

    async def _publish(self) -> None:
        while True:
            await self._stale.wait()
            await asyncio.sleep(self._window_s)
            self._stale.clear()
            while len(self._compiled):
                try:
                    self.feed.change(self._compiled.take(PART_RECORDS))
                except Exception:
                    _log.exception("a change could not be compiled; its objects keep their last records")
                await asyncio.sleep(0)
            # One that came back before anybody was told that it went stays known: nobody would report it anew.
            for key in self._gone:
                if key not in self._watches.quotas:
                    self._spending.forget(key)
            self._gone.clear()

    async def _complete(self) -> None:
        await self._discovery.ready.wait()
        while self._missing():  # noqa: ASYNC110 - kinds come and go: no one event tells of all
            await asyncio.sleep(0.02)

    def _missing(self) -> list[str]:
        if not self._discovery.ready.is_set():
            return ["discovery has not answered"]
        waiting = [f"{kind} is not listed yet" for kind in self._watches.unsynced()]
        if not self._watches.settled:
            waiting.append("installed kinds are not listed yet")
        secrets = self._watches.reflectors["Secret"]
        # Where we may not read Secrets, the tokens that need one are not told; the others must not wait for ever.
        if not secrets.synced.is_set() and not isinstance(secrets.last_error, ForbiddenError):
            waiting.append("Secret is not listed yet")
        if self._discovery.find(*BACKENDS) is not None and "Backend" not in self._reflectors:
            waiting.append("Backend is not listed yet")
        waiting += [f"{kind} is not listed yet" for kind, each in self._reflectors.items() if not each.synced.is_set()]
        return waiting

    async def _follow_backends(self, group: asyncio.TaskGroup) -> None:
        """Watch them from when they are served until they are no more."""
        self._discovery.subscribe(self._discovered.set)
        running: asyncio.Task[None] | None = None
        while True:
            await self._discovered.wait()
            self._discovered.clear()
            resource = self._discovery.find(*BACKENDS)
            if resource is not None and running is None:
                reflector = self._reflect(
                    resource, self._addresses.backends, fragments(BackendResource, BackendFragment)
                )
                running = group.create_task(reflector.run(), name="watch backends for the stream")
            elif resource is None and running is not None:
                running.cancel()
                await asyncio.wait([running])
                running = None
                del self._reflectors["Backend"]
                for key in list(self._addresses.backends):
                    old = self._addresses.backends.pop(key)
                    self._changed("Backend", key, None, old.value if old else None)

    def _reflect(self, resource: Resource, store: Store[T], decode: Decode[T]) -> Reflector[T]:
        kind = resource.kind

        def changed(key: Key, new: T | None, old: T | None) -> None:
            if new != old and self._compiled.touch(kind, key, new, old):
                self._stale.set()

        reflector = Reflector(self._client, resource, decode, store=store, on_change=changed)
        self._reflectors[kind] = reflector
        return reflector

    # -- what happens ---------------------------------------------------------------------------------------------

    def _weigh_now(self, endpoint: ArksEndpoint, backends: Sequence[Backend]) -> Sequence[Backend]:
        return self.loads.weigh(endpoint, backends)

    def _changed(self, kind: str, key: Key, new: Any, old: Any) -> None:
        if kind in {"Service", "EndpointSlice"} and not isinstance(new or old, ServiceFragment | SliceFragment):
            return  # the reconcilers' own watch of the Services that they made
        if kind == "ArksQuota" and new is None:
            self._gone.add(key)
        if self._compiled.touch(kind, key, new, old):
            self._stale.set()

    def _reported(self, report: ReportRequest) -> None:
        for each in report.quotas:
            key = Key(each.namespace, each.name)
            if key in self._watches.quotas:
                kinds = ("prompt", "response", "total")
                self._spending.report(key, {kind: getattr(each, kind) for kind in kinds if each.HasField(kind)})

    def _reweighed(self, key: Key) -> None:
        self._compiled.touch_endpoint(key)
        self._stale.set()

    def _tell_loads(self, loads: Mapping[str, EngineLoad]) -> None:
        if not loads and not self.feed.load:
            return
        told: dict[str, tuple[EngineLoad, bytes]] = {}
        for address, load in loads.items():
            known = self._told.get(address)
            told[address] = known if known is not None and known[0] is load else (load, _piece(load))
        self._told = told
        # Messages written one behind the other are one message with the lists of all: of thousands of engines only
        # those that were looked at since are encoded anew.
        self.feed.tell_load(b"".join(piece for _, piece in told.values()) or _NO_LOADS)


def _piece(load: EngineLoad) -> bytes:
    engine = WireLoad(
        address=load.address,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        healthy=load.healthy,
        ttft_s=load.ttft_s,
    )
    return FollowResponse(load=Load(engines=[engine])).SerializeToString()


def _malformed(_kind: str, _key: Key) -> None:
    """A token or Secret that became unreadable leaves its store, which tells of it; the others keep their last form."""
