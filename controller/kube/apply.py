"""Desired objects to the cluster, without a call when nothing changed.

Server-side apply is idempotent, yet each call costs the API server a read and a merge. The applier remembers what it
applied last and which resourceVersion came back: while the desired object is the same and the live one (from a
`Store`) still has that resourceVersion, there is nothing to correct. Any drift changes the resourceVersion, and the
next reconcile applies again.
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


@dataclass(frozen=True, slots=True)
class Applied:
    """`object` is the server's answer, or None when no call was needed."""

    changed: bool
    object: Object | None = None


class Applier:
    """Apply through one client, remembering versions. One per leadership: a new leader starts without memory."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[_Slot, dict[str, tuple[bytes, str]]] = {}  # by subresource

    async def apply(
        self, resource: Resource, body: Mapping[str, Any], *, live_version: str = "", subresource: str = ""
    ) -> Applied:
        """Bring the object to `body`; `live_version`: the live object's resourceVersion, empty if unknown or absent."""
        meta = body["metadata"]
        slot = (resource, meta.get("namespace", ""), meta["name"])
        digest = hashlib.blake2b(_encode(body), digest_size=16).digest()
        if live_version and self._known.get(slot, {}).get(subresource) == (digest, live_version):
            self._client.stats.writes_skipped += 1
            return Applied(changed=False)
        answer = await self._client.apply(resource, body, subresource=subresource)
        version = answer["metadata"]["resourceVersion"]
        self._known.setdefault(slot, {})[subresource] = (digest, version)
        return Applied(changed=version != live_version, object=answer)

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
