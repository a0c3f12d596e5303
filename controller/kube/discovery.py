"""Which kinds the cluster serves, and when that changes: LWS or RBG may be installed an hour after us.

One request answers for all groups (aggregated discovery), and its ETag makes the repeated question nearly free:
`run()` asks every `interval_s` and calls the subscribers when something was installed, removed or moved to another
version. Every authenticated account may read it, so no right on CRDs is needed. Through an outage the last answer
stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog

from controller.kube.backoff import spread_s
from controller.kube.client import Client
from controller.kube.errors import KubeError
from controller.kube.resource import Resource

INTERVAL_S = 10.0
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"

_log = structlog.get_logger(__name__)


class _ResponseKind(msgspec.Struct):
    kind: str = ""


class _Served(msgspec.Struct, rename="camel"):
    resource: str
    scope: str = "Namespaced"
    response_kind: _ResponseKind | None = None


class _Version(msgspec.Struct):
    version: str
    resources: list[_Served] = []
    freshness: str = "Current"


class _Named(msgspec.Struct):
    name: str = ""


class _Group(msgspec.Struct):
    metadata: _Named
    versions: list[_Version] = []


class _Answer(msgspec.Struct):
    kind: str
    items: list[_Group] = []


_answer = msgspec.json.Decoder(_Answer).decode


class Discovery:
    """Served kinds by group and name. `refresh()` once before use; `run()` keeps it true and is a task of the owner."""

    def __init__(self, client: Client, *, interval_s: float = INTERVAL_S) -> None:
        self.ready = asyncio.Event()  # the first answer is here
        self._client, self._interval_s = client, interval_s
        self._kinds: dict[tuple[str, str], list[Resource]] = {}
        self._tags: dict[str, tuple[str, list[Resource]]] = {}
        self._subscribers: list[Callable[[], None]] = []

    def find(self, group: str, kind: str, versions: Sequence[str] = ()) -> Resource | None:
        """The served resource of a kind: in the first of `versions` that is served, else as the server prefers."""
        served = self._kinds.get((group, kind), [])
        if not versions:
            return served[0] if served else None
        by_version = {resource.version: resource for resource in served}
        return next((by_version[version] for version in versions if version in by_version), None)

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed()` after the served kinds have changed."""
        self._subscribers.append(changed)

    async def refresh(self) -> bool:
        """Ask once; True if anything changed. Raises `KubeError` and then keeps the last answer."""
        found: dict[tuple[str, str], list[Resource]] = {}
        for path in ("/api", "/apis"):
            for resource in await self._ask(path):
                found.setdefault((resource.group, resource.kind), []).append(resource)
        changed = found != self._kinds
        self._kinds = found
        self.ready.set()
        if changed:
            for subscriber in self._subscribers:
                try:
                    subscriber()
                except Exception:
                    _log.exception("subscriber of discovery failed")
        return changed

    async def run(self) -> None:
        """Ask again and again."""
        while True:
            try:
                await self.refresh()
            except KubeError as error:
                _log.warning("discovery failed, the last answer stands", error=str(error))
            except msgspec.DecodeError as error:
                _log.warning("discovery not understood, the last answer stands", error=str(error))
            await asyncio.sleep(self._interval_s * spread_s(0.8, 1.2))

    async def _ask(self, path: str) -> list[Resource]:
        tag, known = self._tags.get(path, ("", []))
        headers = {"Accept": AGGREGATED} | ({"If-None-Match": tag} if tag else {})
        status, answered, body = await self._client.raw(path, headers)
        if status == 304:
            return known
        answer = _answer(body)
        if answer.kind != "APIGroupDiscoveryList":
            raise KubeError("the API server does not offer aggregated discovery (Kubernetes 1.27 and later do)")
        before = {(each.group, each.version): each for each in known}
        found = [
            Resource(group.metadata.name, version.version, served.resource, kind, served.scope == "Namespaced")
            for group in answer.items
            for version in group.versions
            for served in version.resources
            if (kind := served.response_kind.kind if served.response_kind else "")
        ]
        # An aggregated API whose backend is away is listed as stale and empty: what it served, it will serve.
        stale = {(g.metadata.name, v.version) for g in answer.items for v in g.versions if v.freshness == "Stale"}
        found += [each for each in known if (each.group, each.version) in stale & before.keys() and each not in found]
        self._tags[path] = (answered.get("ETag", ""), found)
        return found
