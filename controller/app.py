"""The controller's process: credentials, discovery, watches, Lease, loops, health.

Every replica watches and, where asked to, publishes the policy to its own extproc; the holder of the Lease writes.
Order of starting: HTTP first, so that probes are answered, then discovery, watches and the policy stream, then the
election. SIGTERM and SIGINT end it in order: the loops, the Lease handed back so that another takes over at once, the
watches. Exit status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from controller.health import Admin
from controller.kube.client import Client
from controller.kube.credentials import Credentials, detect
from controller.kube.discovery import Discovery
from controller.kube.events import Events
from controller.kube.lease import Lease
from controller.kube.resource import Key
from controller.reconcile.claims import Growth
from controller.reconcile.context import Context, Weigh
from controller.reconcile.downloads import Downloads
from controller.reconcile.kinds import Request
from controller.reconcile.registry import Reconciler
from controller.reconcile.spending import Spending
from controller.reconcile.watches import Watches
from controller.reconcile.writing import Writer
from controller.settings import ControllerSettings
from controller.snapshot.publisher import Publisher
from controller.status import StatusWriter

INSTALL: Final = "arks crds | kubectl apply --server-side -f -"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_log = structlog.get_logger(__name__)


class Controller:
    """All parts around one client. `run()` is a task of the owner and ends when it is cancelled."""

    def __init__(self, client: Client, settings: ControllerSettings, *, weigh: Weigh | None = None) -> None:
        self.client, self.settings = client, settings
        self.discovery = Discovery(client, interval_s=settings.discovery_s)
        self.watches = Watches(client, self.discovery)
        self.lease = Lease(
            client,
            settings.namespace,
            settings.lease_name,
            settings.identity,
            lease_s=settings.lease_s,
            renew_s=settings.renew_s,
            retry_s=settings.retry_s,
        )
        self.spending = Spending(self._spent)
        self.publisher: Publisher | None = None
        if settings.policy_stream is not None:
            self.publisher = Publisher(
                client, self.discovery, self.watches, settings.policy_stream, spending=self.spending
            )
            self.publisher.on_route_weights(self._weights_changed)
            weigh = weigh or self.publisher.weigh
        self.reconciler: Reconciler | None = None
        self.events = Events(client.fenced(self.lease.fence), instance=settings.identity)
        self._weigh = weigh

    def unready(self) -> list[str]:
        """What is still missing before the stores can be trusted."""
        if not self.discovery.ready.is_set():
            return ["discovery has not answered"]
        waiting = [f"{kind} is not listed yet" for kind in self.watches.unsynced()]
        waiting = waiting or [f"the kind {kind} is not installed: {INSTALL}" for kind in self.watches.uninstalled()]
        return waiting or (self.publisher.unready() if self.publisher is not None else [])

    async def run(self) -> None:
        """Watch, stand for election, lead."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.discovery.run(), name="discovery")
            group.create_task(self.watches.run(), name="watches")
            if self.publisher is not None:
                # Leader or not: every replica tells its own extproc.
                group.create_task(self.publisher.run(), name="policy stream")
            await self.watches.synced()
            _log.info("watching", objects=sum(len(each.store) for each in self.watches.reflectors.values()))
            group.create_task(self.lease.run(self._lead), name="lease")

    def _weights_changed(self, endpoint: Key) -> None:
        if self.reconciler is not None and self.lease.is_leader:
            self.reconciler.queue.add(Request("ArksEndpoint", *endpoint))

    def _spent(self, quota: Key) -> None:
        if self.reconciler is not None and self.lease.is_leader:
            self.reconciler.queue.add(Request("ArksQuota", *quota))

    async def _lead(self) -> None:
        """While the Lease is ours. Of an earlier leadership only the Events are kept that it could not send."""
        client, events = self.client.fenced(self.lease.fence), self.events
        context = Context(
            client=client,
            watches=self.watches,
            writer=Writer(client, self.watches),
            status=StatusWriter(client, events),
            events=events,
            downloads=Downloads(client, self.settings.model_progress_s),
            claims=Growth(),
            spending=self.spending,
            environment=self.settings.environment,
            model_retry_s=self.settings.model_retry_s,
            **({"weigh": self._weigh} if self._weigh is not None else {}),
        )
        self.reconciler = Reconciler(context, workers=self.settings.workers)
        async with asyncio.TaskGroup() as group:
            group.create_task(events.run(), name="events")
            group.create_task(self.reconciler.run(), name="reconcile")


async def run(settings: ControllerSettings, credentials: Credentials | None = None) -> int:
    """Run until SIGTERM or SIGINT. Raises `CredentialsError` where there are none to begin with: nothing would come of
    waiting.
    """
    credentials = credentials or detect(settings.kubeconfig, settings.context)
    try:
        await credentials.access()
    finally:
        await credentials.close()
    client = Client(credentials, silence_s=settings.watch_silence_s)
    controller = Controller(client, settings)
    async with (
        client,
        Admin(controller, settings.admin_host, settings.admin_port, unready=controller.unready) as admin,
    ):
        _log.info("controller started", identity=settings.identity, admin=f"{settings.admin_host}:{admin.port}")
        await _until_signal(controller.run)
    _log.info("controller stopped")
    return 0


async def _until_signal(work: Callable[[], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work())
    for number in _SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
