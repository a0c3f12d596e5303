"""Kinds and their loops, behind one queue: what the leader runs.

`Reconciler.run` starts with every resource there is, follows the changes, and ends when it is cancelled; nothing is
remembered from one leadership to the next. A resource that does not even decode gets a condition that says so and
leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from controller.kube.errors import NotFoundError
from controller.kube.queue import WorkQueue
from controller.kube.resource import Key
from controller.reconcile.application import reconcile_application, reconcile_disaggregated
from controller.reconcile.context import RESYNC_S, Context
from controller.reconcile.desired.phase import Verdict
from controller.reconcile.endpoint import reconcile_endpoint
from controller.reconcile.finalizers import release
from controller.reconcile.kinds import ARKS, Request
from controller.reconcile.model import reconcile_model
from controller.reconcile.requests import OWNED, everything, requests
from controller.reconcile.token import reconcile_quota, reconcile_token
from controller.status import About

Reconcile = Callable[[Context, Key], Awaitable[float | None]]
WORKERS: Final = 8

RECONCILERS: Final[Mapping[str, Reconcile]] = {
    "ArksApplication": reconcile_application,
    "ArksDisaggregatedApplication": reconcile_disaggregated,
    "ArksEndpoint": reconcile_endpoint,
    "ArksModel": reconcile_model,
    "ArksQuota": reconcile_quota,
    "ArksToken": reconcile_token,
}
# Where the kind's first condition says that the resource itself is wrong.
_FIRST_CONDITION: Final = {
    "ArksApplication": "Precheck",
    "ArksDisaggregatedApplication": "Precheck",
    "ArksModel": "StorageCreated",
}


class Reconciler:
    """One leadership's loops."""

    def __init__(self, context: Context, *, workers: int = WORKERS) -> None:
        self._context, self._watches = context, context.watches
        self.queue: WorkQueue[Request] = WorkQueue(self._handle, name="reconcile", workers=workers)

    async def run(self) -> None:
        """Work until cancelled."""
        self._watches.subscribe(self._changed, self._malformed)
        try:
            for request in everything(self._watches):
                self.queue.add(request)
            await self.queue.run()
        finally:
            self._watches.unsubscribe(self._changed, self._malformed)

    def _changed(self, kind: str, key: Key, new: Any, old: Any) -> None:
        if new is None and kind in OWNED:
            self._context.writer.gone(old)
        for request in requests(self._watches, kind, key, new, old):
            self.queue.add(request)

    def _malformed(self, kind: str, key: Key) -> None:
        if kind in RECONCILERS:
            self.queue.add(Request(kind, *key))

    async def _handle(self, request: Request) -> float | None:
        wrong = self._watches.malformed(request.kind, request.key)
        if wrong:
            return await self._report(request, wrong)
        return await RECONCILERS[request.kind](self._context, request.key)

    async def _report(self, request: Request, wrong: str) -> float | None:
        """The schema let it pass, our types do not: say which field, and let it go if it is dying."""
        context, resource = self._context, ARKS[request.kind]
        try:
            live = await context.client.get(resource, request.name, request.namespace)
        except NotFoundError:
            return None
        meta = live["metadata"]
        if meta.get("deletionTimestamp"):
            finalizers = meta.get("finalizers") or ()
            await release(context.client, resource, *request.key, finalizers, meta["resourceVersion"])
            return None
        status = live.get("status") or {}
        about = About(resource, *request.key, meta["uid"], meta.get("generation", 0), meta["resourceVersion"], status)
        first = Verdict(_FIRST_CONDITION.get(request.kind, "Accepted"), "False", "InvalidSpec", wrong)
        others = [
            Verdict(each["type"], each["status"], each.get("reason", ""), each.get("message", ""))
            for each in status.get("conditions") or ()
            if each["type"] != first.type
        ]
        kept = {key: value for key, value in status.items() if key not in {"conditions", "observedGeneration"}}
        if request.kind in _FIRST_CONDITION:
            kept = {"phase": "Failed", **_counters(request.kind), **kept}
        await context.status.write(about, [first, *others], kept)
        return RESYNC_S


def _counters(kind: str) -> dict[str, Any]:
    return {"replicas": 0, "readyReplicas": 0, "updatedReplicas": 0} if kind == "ArksApplication" else {}
