"""Weights that follow the load: looks at the engines, one step of `weights_for` a second, two consumers.

extproc gets each step (`weigh`); the HTTPRoute only what is worth a write to the API (`weigh_route`): a shift of a
tenth of the traffic, or a backend that died or came to life, and not within ten seconds of the last. Requests are
pinned by extproc, so the route's weights matter only where it is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import structlog

from apis.resources import ArksEndpoint
from controller.kube.resource import Key
from controller.reconcile.desired.endpoint import Backend
from controller.weights.model import Damping, EngineLoad, Share
from controller.weights.scraper import Scraper
from controller.weights.shares import DAMPING, weights_for

SWEEP_S: Final = 0.5
STEP_S: Final = 1.0
ROUTE_SHIFT: Final = 0.1
ROUTE_S: Final = 10.0

Engines = Callable[[ArksEndpoint, str], Sequence[str]]  # endpoint and application to ip:port
Changed = Callable[[Key], None]
_log = structlog.get_logger(__name__)


class _Followed:
    """One endpoint with weightPolicy load."""

    __slots__ = ("addresses", "backends", "endpoint", "resting", "route", "route_at_s", "shares", "weights")

    def __init__(self) -> None:
        self.endpoint: ArksEndpoint | None = None
        """as of the last step; one that changed is another object"""
        self.backends: Sequence[Backend] = ()
        self.addresses: frozenset[str] = frozenset()
        """of all its engines, as of the last step"""
        self.shares: dict[str, Share] = {}
        self.weights: dict[str, int] = {}
        """of the shares"""
        self.route: dict[str, int] = {}
        self.route_at_s = float("-inf")
        self.resting = False
        """nothing moved in the last step: without news, nothing will"""


class LoadFollower:
    """`run()` is a task of the owner. `endpoint_of` gives an endpoint as it is, `engines` where its backends are."""

    def __init__(
        self,
        endpoint_of: Callable[[Key], ArksEndpoint | None],
        engines: Engines,
        *,
        scraper: Scraper | None = None,
        damping: Damping = DAMPING,
        clock: Callable[[], float] = time.monotonic,
        sweep_s: float = SWEEP_S,
        step_s: float = STEP_S,
    ) -> None:
        self.scraper = scraper or Scraper(clock=clock)
        self._endpoint_of, self._engines, self._damping, self._clock = endpoint_of, engines, damping, clock
        self._sweep_s, self._step_s = sweep_s, step_s
        self._followed: dict[Key, _Followed] = {}
        self._wanted: set[str] = set()
        """addresses of all followed engines, as of the last step"""
        self._seen: Mapping[str, EngineLoad] = {}
        self._on_shares: list[Changed] = []
        self._on_route: list[Changed] = []
        self._on_loads: list[Callable[[Mapping[str, EngineLoad]], None]] = []

    def subscribe(
        self,
        *,
        shares: Changed | None = None,
        route: Changed | None = None,
        loads: Callable[[Mapping[str, EngineLoad]], None] | None = None,
    ) -> None:
        """Called on the loop: an endpoint's shares moved; so far that its route should; the engines were looked at."""
        if shares is not None:
            self._on_shares.append(shares)
        if route is not None:
            self._on_route.append(route)
        if loads is not None:
            self._on_loads.append(loads)

    # -- what others ask ------------------------------------------------------------------------------------------

    def weigh(self, endpoint: ArksEndpoint, backends: Sequence[Backend]) -> Sequence[Backend]:
        """For extproc: the present shares."""
        followed = self._note(endpoint, backends)
        if followed is None:
            return backends
        if {each.application for each in backends} != followed.shares.keys():
            self._step_one(endpoint, followed)
        return [replace(each, weight=followed.weights[each.application]) for each in backends]

    def weigh_route(self, endpoint: ArksEndpoint, backends: Sequence[Backend]) -> Sequence[Backend]:
        """For the HTTPRoute: shares of a while ago, unless backends came or went."""
        current = self.weigh(endpoint, backends)
        followed = self._followed.get(_key(endpoint))
        if followed is None:
            return current
        if {each.application for each in backends} != followed.route.keys():
            self._settle_route(followed)
        return [replace(each, weight=followed.route[each.application]) for each in backends]

    # -- life -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look and step until cancelled."""
        step_at_s = self._clock()
        while True:
            began_s = self._clock()
            try:
                await self.scraper.sweep(self._wanted)
                if self._clock() >= step_at_s:
                    step_at_s = self._clock() + self._step_s - self._sweep_s / 2
                    self.step()
            except Exception:
                _log.exception("following the load failed; the last weights stay")
            await asyncio.sleep(max(0.05, self._sweep_s - (self._clock() - began_s)))

    def step(self) -> None:
        """One step of every followed endpoint, from the loads as they are."""
        news = self._news()
        for key, followed in list(self._followed.items()):
            endpoint = self._endpoint_of(key)
            if endpoint is None or endpoint.spec.weight_policy != "load":
                del self._followed[key]
                continue
            # Of a thousand endpoints few have news within a second.
            if followed.resting and endpoint is followed.endpoint and followed.addresses.isdisjoint(news):
                continue
            if self._step_one(endpoint, followed):
                for tell in self._on_shares:
                    tell(key)
            if _route_behind(followed):
                if self._clock() - followed.route_at_s < ROUTE_S:
                    followed.resting = False  # its time will come
                    continue
                self._settle_route(followed)
                for tell in self._on_route:
                    tell(key)
        self._wanted = set().union(*(followed.addresses for followed in self._followed.values()))
        for tell_loads in self._on_loads:
            tell_loads(self.scraper.loads)

    def _note(self, endpoint: ArksEndpoint, backends: Sequence[Backend]) -> _Followed | None:
        if endpoint.spec.weight_policy != "load":
            self._followed.pop(_key(endpoint), None)
            return None
        followed = self._followed.setdefault(_key(endpoint), _Followed())
        # Capacity or addresses may have changed: the weights follow at the next step; who came or went is seen at once.
        followed.backends, followed.resting = tuple(backends), False
        return followed

    def _news(self) -> set[str]:
        """Engines whose load is another than at the last call."""
        before, self._seen = self._seen, self.scraper.loads
        gone = before.keys() - self._seen.keys()
        return gone | {
            address for address, load in self._seen.items() if (was := before.get(address)) is not load and was != load
        }

    def _step_one(self, endpoint: ArksEndpoint, followed: _Followed) -> bool:
        """Whether any weight moved."""
        known = self.scraper.loads
        engines = {each.application: self._engines(endpoint, each.application) for each in followed.backends}
        loads = {
            application: [known[address] for address in addresses if address in known]
            for application, addresses in engines.items()
        }
        shares = weights_for(endpoint, followed.backends, loads, followed.shares, self._damping)
        followed.endpoint, followed.addresses = endpoint, frozenset().union(*engines.values())
        followed.resting = shares == followed.shares
        followed.shares = shares
        before, followed.weights = followed.weights, {name: share.weight for name, share in shares.items()}
        return followed.weights != before

    def _settle_route(self, followed: _Followed) -> None:
        followed.route = dict(followed.weights)
        followed.route_at_s = self._clock()


def _route_behind(followed: _Followed) -> bool:
    """Whether the route's weights are so far from the present ones that it is worth a write."""
    now = followed.weights
    if not followed.route or now == followed.route:
        return False
    if any((now.get(name, 0) > 0) != (weight > 0) for name, weight in followed.route.items()):
        return True
    total, before = sum(now.values()) or 1, sum(followed.route.values()) or 1
    return any(abs(now.get(name, 0) / total - was / before) >= ROUTE_SHIFT for name, was in followed.route.items())


def _key(endpoint: ArksEndpoint) -> Key:
    return Key(endpoint.metadata.namespace, endpoint.metadata.name)
