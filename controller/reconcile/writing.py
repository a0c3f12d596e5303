"""Desired objects to the cluster: applied, taken over from Arks, deleted, and never over a stranger's head.

`Writer.carry_out` is one step of a plan: apply all, then delete. A refusal that another request would meet again
(invalid, forbidden, taken) comes back as a `Refusal` for a condition; what may pass by itself is raised, and the work
queue tries again. Every call goes through a fenced client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from controller.kube.apply import Applier
from controller.kube.client import Client, Object
from controller.kube.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    NotFoundError,
)
from controller.kube.resource import Key, Resource
from controller.reconcile.objects import owners, uid_of
from controller.reconcile.takeover import arks_owns_fields, take_over
from controller.reconcile.watches import Watches
from controller.workloads.model import APPLICATION_LABEL, MODEL_LABEL, Deletion

NAME_TAKEN: Final = "NameTaken"
REFUSED_AGAIN_S: Final = 30.0
"""a refusal may end without a change that we would see: a quota raised, a right granted"""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server does not take an object, or a stranger has its name."""

    kind: str
    name: str
    reason: str
    message: str

    def told(self, field: str) -> str:
        """For a condition; `field` is what the object was made from."""
        if self.reason == NAME_TAKEN:
            return f"metadata.name: {self}"
        return f"{field}: the API server refused {self}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.message}"


class NotServedError(KubeError):
    """The API of an object has gone since it was planned."""

    reason = "NotServed"


class Writer:
    """One per leadership: what it remembers is what this leader wrote."""

    def __init__(self, client: Client, watches: Watches) -> None:
        self._client, self._watches = client, watches
        self._applier = Applier(client)
        self._wrote: dict[tuple[str, Key], int] = {}
        self._deleted: set[str] = set()
        """uids of what we have deleted and of whose end the watch has not told yet"""

    def deleted(self, item: Object) -> bool:
        """Is this live object on its way out, by its own word or because we deleted it and have not heard of it yet?"""
        return _deleting(item) or uid_of(item) in self._deleted

    def behind(self, items: Iterable[Object]) -> bool:
        """Is one of these live objects older than what we wrote? Then a plan from them would repeat the past."""
        for item in items:
            meta = item["metadata"]
            slot = (item["kind"], Key(meta.get("namespace", ""), meta["name"]))
            written = self._wrote.get(slot)
            if written is None:
                continue
            if int(meta.get("resourceVersion", 0)) < written:
                return True
            del self._wrote[slot]
        return False

    async def carry_out(
        self, uid: str, objects: Iterable[Object], deletions: Iterable[Deletion] = ()
    ) -> Refusal | None:
        """`uid` is the owner's. Stops at the first refusal."""
        for body in objects:
            refusal = await self.apply(uid, body)
            if refusal is not None:
                return refusal
        for gone in deletions:
            refusal = await self.delete(gone)
            if refusal is not None:
                return refusal
        return None

    async def apply(self, uid: str, body: Object, *, trusted: bool = False) -> Refusal | None:
        """`trusted`: the caller has judged the live object of that name to be ours to take."""
        kind, meta = body["kind"], body["metadata"]
        key = Key(meta.get("namespace", ""), meta["name"])
        resource = self._resource(body["apiVersion"], kind)
        live = self._watches.owned(kind, key)
        try:
            if live is not None and _deleting(live):
                return None  # its end will call us again
            if live is not None and left_by_namesake(live, body["metadata"]["ownerReferences"][0]):
                await self._remove(resource, live)
                return None
            if live is not None and _stranger(live, uid, body):
                return Refusal(kind, key.name, NAME_TAKEN, "an object of this name is not ours; rename one of them")
            if live is not None and "managedFields" in live["metadata"]:
                await self._take_over(resource, live, everyones=kind == "RoleBasedGroup")
                live = None  # its version has changed
            if live is None and not trusted and not await self._free(resource, key, uid, body):
                return Refusal(kind, key.name, NAME_TAKEN, "an object of this name is not ours; rename one of them")
            applied = await self._applier.apply(resource, body, live=live)
            if applied.object is not None:
                await self._settle(resource, body, applied.object)
        except (InvalidError, ForbiddenError) as error:
            return Refusal(kind, key.name, error.reason, error.message)
        except NotFoundError as error:  # the namespace is going
            return Refusal(kind, key.name, error.reason, error.message)
        return None

    async def delete(self, gone: Deletion) -> Refusal | None:
        """Delete what was observed, not a namesake that came after it."""
        key = Key(gone.namespace, gone.name)
        live = self._watches.owned(gone.kind, key)
        if live is not None and _deleting(live):
            return None
        resource = self._resource(gone.api_version, gone.kind)
        self._forget(resource, key)
        uid = uid_of(live) if live is not None else ""
        if uid:
            self._deleted.add(uid)  # before its end can be heard
        try:
            await self._client.delete(resource, gone.name, gone.namespace, uid=uid, propagation=gone.propagation)
        except (NotFoundError, ConflictError):
            return None
        except (InvalidError, ForbiddenError) as error:
            self._deleted.discard(uid)
            return Refusal(gone.kind, gone.name, error.reason, error.message)
        except BaseException:
            self._deleted.discard(uid)
            raise
        return None

    def gone(self, old: Object) -> None:
        """The watch says that the object is no more: whoever has its name next need not be ours."""
        meta = old["metadata"]
        self._deleted.discard(uid_of(old))
        resource = self._watches.find(old["apiVersion"], old["kind"])
        if resource is not None:
            self._forget(resource, Key(meta.get("namespace", ""), meta["name"]))

    async def _remove(self, resource: Resource, live: Object) -> None:
        """What a deleted namesake of the owner left: the cluster's collector would remove it, in its time."""
        meta = live["metadata"]
        self._forget(resource, Key(meta.get("namespace", ""), meta["name"]))
        with contextlib.suppress(NotFoundError, ConflictError):
            await self._client.delete(resource, meta["name"], meta.get("namespace", ""), uid=uid_of(live))

    def _forget(self, resource: Resource, key: Key) -> None:
        self._applier.forget(resource, key.name, key.namespace)
        self._wrote.pop((resource.kind, key), None)

    def _resource(self, api_version: str, kind: str) -> Resource:
        resource = self._watches.find(api_version, kind)
        if resource is None:
            raise NotServedError(f"{api_version} {kind} is not served (any more)")
        return resource

    async def _free(self, resource: Resource, key: Key, uid: str, body: Object) -> bool:
        """Nobody has the name, or whoever has it is ours. Asked before what we have never seen is written."""
        if (resource.kind, key) in self._wrote:
            return True
        try:
            live = await self._client.get(resource, key.name, key.namespace)
        except NotFoundError:
            return True
        live["kind"] = resource.kind
        if _stranger(live, uid, body):
            return False
        if arks_owns_fields(live["metadata"].get("managedFields", ())):
            await self._take_over(resource, live, everyones=resource.kind == "RoleBasedGroup")
        return True

    async def _take_over(self, resource: Resource, live: Object, *, everyones: bool) -> None:
        meta = live["metadata"]
        self._applier.forget(resource, meta["name"], meta.get("namespace", ""))
        await take_over(self._client, resource, live, everyones=everyones)

    async def _settle(self, resource: Resource, body: Object, answer: Object) -> None:
        meta = answer["metadata"]
        self._wrote[resource.kind, Key(meta.get("namespace", ""), meta["name"])] = int(meta["resourceVersion"])


def _deleting(item: Mapping[str, Any]) -> bool:
    return bool(item["metadata"].get("deletionTimestamp"))


def left_by_namesake(live: Object, owner: Object) -> bool:
    """Made for an object of the owner's kind and name that is no more."""
    named = (owner["kind"], owner["name"])
    return any(
        (each["kind"], each["name"]) == named and each["uid"] != owner["uid"] for each in owners(live)
    ) and not any(each["uid"] == owner["uid"] for each in owners(live))


def _stranger(live: Object, uid: str, body: Object) -> bool:
    """Somebody else's object: another controller owns it, or nobody does and nothing marks it as ours or Arks'."""
    found = owners(live)
    if any(owner["uid"] == uid for owner in found):
        return False
    if any(owner.get("controller") and owner["kind"] != "RoleBasedGroupSet" for owner in found):
        return True
    labels = live["metadata"].get("labels") or {}
    wanted = body["metadata"].get("labels") or {}
    if any(key in labels and labels[key] == wanted.get(key) for key in (APPLICATION_LABEL, MODEL_LABEL)):
        return False
    if labels.get("managed-by") == "arks":
        return False
    return live["kind"] not in {"RoleBasedGroup", "HTTPRoute"}
