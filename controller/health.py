"""`/healthz`, `/readyz` and `/metrics` of the controller.

Alive: every watch has heard the API server within three of its bookmarks' minutes, no pass has been running for many,
and a lost leadership has ended, else this replica would never stand for election again. Ready: every store has had its
first picture; a replica that only stands by is ready, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol, Self

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.kube.client import Client
from controller.kube.lease import Lease
from controller.reconcile.registry import Reconciler
from controller.reconcile.watches import Watches

DEAF_S: Final = 180.0
STUCK_S: Final = 300.0


class Parts(Protocol):
    """What is asked."""

    client: Client
    watches: Watches
    lease: Lease
    reconciler: Reconciler | None


def problems(parts: Parts) -> list[str]:
    """Why the process should be started anew."""
    found = [
        f"{kind} has not been heard for {reflector.age_s:.0f} s"
        for kind, reflector in parts.watches.reflectors.items()
        if reflector.age_s > DEAF_S
    ]
    if parts.reconciler is not None and parts.reconciler.queue.longest_running_s() > STUCK_S:
        found.append("a pass is stuck")
    if parts.lease.ending_s > STUCK_S:
        found.append("the lease is lost, and what led does not end")
    return found


class _Numbers(Collector):
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        parts = self._parts
        yield GaugeMetricFamily("arks_controller_leader", "1 while this replica writes.", value=parts.lease.is_leader)
        objects = GaugeMetricFamily("arks_controller_objects", "Objects known.", labels=["kind"])
        age = GaugeMetricFamily(
            "arks_controller_watch_age_seconds", "Since the API server was last heard.", labels=["kind"]
        )
        outage = GaugeMetricFamily(
            "arks_controller_watch_outage_seconds",
            "For which the store has not been kept up to date; 0: it is well.",
            labels=["kind"],
        )
        malformed = GaugeMetricFamily("arks_controller_malformed", "Objects that do not decode.", labels=["kind"])
        for kind, reflector in parts.watches.reflectors.items():
            objects.add_metric([kind], len(reflector.store))
            age.add_metric([kind], reflector.age_s)
            outage.add_metric([kind], reflector.outage_s)
            malformed.add_metric([kind], len(reflector.malformed))
        yield from (objects, age, outage, malformed)
        calls = CounterMetricFamily(
            "arks_controller_api_calls", "Calls to the API server.", labels=["verb", "group", "resource", "outcome"]
        )
        for labels, count in sorted(parts.client.stats.calls.items()):
            calls.add_metric(list(labels), count)
        yield calls
        yield CounterMetricFamily(
            "arks_controller_writes_fenced", "Held back without the lease.", value=parts.client.stats.writes_fenced
        )
        if parts.reconciler is not None:
            yield from self._queue(parts.reconciler)

    def _queue(self, reconciler: Reconciler) -> Iterator[Metric]:
        queue = reconciler.queue
        yield GaugeMetricFamily("arks_controller_queue_depth", "Resources that wait.", value=queue.depth)
        yield GaugeMetricFamily("arks_controller_queue_delayed", "Resources that wait for a time.", value=queue.delayed)
        passes = CounterMetricFamily("arks_controller_passes", "Passes of the loops.", labels=["outcome"])
        passes.add_metric(["done"], queue.stats.done)
        passes.add_metric(["failed"], queue.stats.failed)
        yield passes


class Admin:
    """The server. `async with Admin(parts, host, port) as admin`; `admin.port` is the bound one."""

    def __init__(self, parts: Parts, host: str, port: int, *, unready: Callable[[], list[str]]) -> None:
        self._parts, self._host, self.port, self._unready = parts, host, port, unready
        self._registry = CollectorRegistry()
        self._registry.register(_Numbers(parts))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        application = web.Application()
        application.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port)
        await site.start()
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return _verdict(problems(self._parts))

    async def _readyz(self, _: web.Request) -> web.Response:
        return _verdict(self._unready())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _verdict(found: list[str]) -> web.Response:
    return web.Response(text="\n".join(found) or "ok", status=503 if found else 200)
