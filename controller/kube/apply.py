"""Desired objects to the cluster, without a call when nothing changed.

Server-side apply is idempotent, yet each call costs the API server a read and a merge. The applier remembers what it
applied last and what came back: while the desired object is the same and the live one (from a `Store`, which need not
keep its spec) still has that resourceVersion, or differs in its status alone, there is nothing to correct. Drift of the
spec changes the generation where a kind has one, else the resourceVersion; and the next reconcile applies again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from controller.kube.client import Client, Object
from controller.kube.errors import NotFoundError
from controller.kube.resource import Resource

_encode = msgspec.json.Encoder(order="deterministic").encode
_Slot = tuple[Resource, str, str]
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
# Changes with every write, or names writers.
_BOOKKEEPING = frozenset({"managedFields", "resourceVersion"})


@dataclass(frozen=True, slots=True)
class Applied:
    """`object` is the server's answer, or None when no call was needed."""

    changed: bool
    object: Object | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """Digests of what was applied and of the metadata that came of it, generation included; and its version."""

    body: bytes
    meta: bytes
    version: str


class Applier:
    """Apply through one client, remembering versions. One per leadership: a new leader starts without memory."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[_Slot, dict[str, _Known]] = {}  # by subresource

    async def apply(
        self, resource: Resource, body: Mapping[str, Any], *, live: Object | None = None, subresource: str = ""
    ) -> Applied:
        """Bring the object to `body`; `live` is it as it was seen last, None if unknown or absent."""
        meta = body["metadata"]
        slot = (resource, meta.get("namespace", ""), meta["name"])
        digest = _digest(body)
        known = self._known.get(slot, {}).get(subresource)
        if live is not None and known is not None and known.body == digest and _stands(live, known):
            self._client.stats.writes_skipped += 1
            return Applied(changed=False)
        answer = await self._client.apply(resource, body, subresource=subresource)
        version = answer["metadata"]["resourceVersion"]
        self._known.setdefault(slot, {})[subresource] = _Known(digest, _digest(_lasting(answer["metadata"])), version)
        return Applied(changed=live is None or version != live["metadata"]["resourceVersion"], object=answer)

    async def delete(self, resource: Resource, name: str, namespace: str = "", *, uid: str = "") -> bool:
        """Delete if it is there; False if it was not."""
        self.forget(resource, name, namespace)
        try:
            await self._client.delete(resource, name, namespace, uid=uid)
        except NotFoundError:
            return False
        return True

    def forget(self, resource: Resource, name: str, namespace: str = "") -> None:
        """The object is gone: keep no memory of it."""
        self._known.pop((resource, namespace, name), None)


def _stands(live: Object, known: _Known) -> bool:
    """Is nothing but the status another than it was when we had applied?"""
    meta = live["metadata"]
    if meta["resourceVersion"] == known.version:
        return True
    return "generation" in meta and _digest(_lasting(meta)) == known.meta


def _lasting(meta: Mapping[str, Any]) -> Object:
    notes = {key: value for key, value in (meta.get("annotations") or {}).items() if key != _LAST_APPLIED}
    return {key: value for key, value in meta.items() if key not in _BOOKKEEPING} | {"annotations": notes}


def _digest(tree: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(_encode(tree), digest_size=16).digest()
