"""Policy records kept true to the stores, one object at a time.

`touch` marks what a change may have altered; `compile` makes the record of one marked object anew from what the stores
hold now. Nothing here walks all objects: a token costs a look at its Secret, an endpoint a look at its backends.

Fails closed: an object that is being deleted, or whose Secret is missing, has no record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from apis.compile import link
from apis.fragments import (
    BackendFragment,
    EndpointFragment,
    Fragment,
    Ident,
    RouteRef,
    SecretFragment,
    ServiceFragment,
    SliceFragment,
    fragment,
)
from apis.policy import Endpoint, Quota, Token
from apis.records import ENDPOINT, QUOTA, TOKEN, Place, Record
from apis.resources import ArksEndpoint
from controller.engines.model import SERVING_PORT
from controller.kube.resource import Key
from controller.kube.store import Store
from controller.reconcile.context import Weigh
from controller.reconcile.desired.application import served_name
from controller.reconcile.desired.endpoint import backend_refs, discovered
from controller.reconcile.desired.service import service_name
from controller.reconcile.watches import Watches

_KINDS: Final = {"ArksToken": TOKEN, "ArksQuota": QUOTA, "ArksEndpoint": ENDPOINT}


class Addresses:
    """What stands behind Services and Backends, as the publisher's own watches fill it."""

    def __init__(self) -> None:
        self.services: Store[ServiceFragment] = Store()
        self.slices: Store[SliceFragment] = Store(service=lambda found: [found.service])
        self.backends: Store[BackendFragment] = Store()

    def behind(self, reference: RouteRef) -> Iterable[Fragment]:
        """The objects that say where a reference leads."""
        key = Key(reference.namespace, reference.name)
        if reference.kind == "Backend":
            backend = self.backends.get(key)
            return () if backend is None else (backend,)
        service = self.services.get(key)
        return () if service is None else (service, *self.slices.by("service", key))


class Compiled:
    """`weigh` has the last word on the weights of an endpoint's applications."""

    def __init__(self, watches: Watches, addresses: Addresses, weigh: Weigh) -> None:
        self._watches, self._addresses, self._weigh = watches, addresses, weigh
        self._dirty: dict[Place, None] = {}
        self._users: dict[tuple[str, str, str], set[Key]] = {}
        """endpoints by (kind, namespace, name) of what they refer to"""
        self._uses: dict[Key, frozenset[tuple[str, str, str]]] = {}
        self._engines: dict[tuple[str, str], tuple[str, ...]] = {}
        """addresses by (namespace, Service), as long as they hold: they are asked for twice a second"""

    def __len__(self) -> int:
        """Objects whose records may be stale."""
        return len(self._dirty)

    # -- what a change may have altered ---------------------------------------------------------------------------

    def touch(self, kind: str, key: Key, new: Any, old: Any) -> bool:
        """Whether anything is stale now."""
        if kind in _KINDS:
            self._dirty[_KINDS[kind], key.namespace, key.name] = None
        elif kind == "Secret":
            for holder in self._watches.tokens.keys_by("secret", (key.namespace, key.name)):
                self._dirty[TOKEN, holder.namespace, holder.name] = None
        elif kind in {"ArksApplication", "ArksDisaggregatedApplication"}:
            for each in (new, old):
                if each is not None:
                    self._serving(key.namespace, _served(kind, each))
        elif kind in {"Service", "Backend"}:
            self._referring(kind, key.namespace, key.name)
        elif kind == "EndpointSlice":
            for each in (new, old):
                if each is not None:
                    self._referring("Service", *each.service)
        return bool(self._dirty)

    def touch_all(self) -> None:
        """For the first picture."""
        for kind, store in (
            (TOKEN, self._watches.tokens),
            (QUOTA, self._watches.quotas),
            (ENDPOINT, self._watches.endpoints),
        ):
            for key in store:
                self._dirty[kind, key.namespace, key.name] = None

    def touch_endpoint(self, key: Key) -> None:
        """Its weights have changed."""
        self._dirty[ENDPOINT, key.namespace, key.name] = None

    def _serving(self, namespace: str, model: str) -> None:
        for key in self._watches.endpoints.keys_by("model", (namespace, model)):
            self._dirty[ENDPOINT, key.namespace, key.name] = None

    def _referring(self, kind: str, namespace: str, name: str) -> None:
        self._engines.pop((namespace, name), None)
        for key in self._users.get((kind, namespace, name), ()):
            self._dirty[ENDPOINT, key.namespace, key.name] = None

    # -- records --------------------------------------------------------------------------------------------------

    def take(self, most: int) -> list[tuple[Place, Record | None]]:
        """Up to so many stale objects, and what they say now; None: nothing (any more)."""
        found: list[tuple[Place, Record | None]] = []
        while self._dirty and len(found) < most:
            # In the order of the changes.
            place = next(iter(self._dirty))
            del self._dirty[place]
            found.append((place, self._record(place)))
        return found

    def _record(self, place: Place) -> Record | None:
        kind, key = place[0], Key(place[1], place[2])
        if kind == TOKEN:
            return self._token(key)
        if kind == QUOTA:
            return self._quota(key)
        return self._endpoint(key)

    def _token(self, key: Key) -> Token | None:
        token = self._watches.tokens.get(key)
        if token is None or token.deleting:
            return None
        made = token.fragment
        if made.secret is None:
            return made.record
        fragments: dict[Ident, Fragment] = {made.ident: made}
        secret = self._watches.secrets.get(Key(key.namespace, made.secret[0]))
        if isinstance(secret, SecretFragment):
            fragments[secret.ident] = secret
        return link(fragments).policy.tokens.get(key)

    def _quota(self, key: Key) -> Quota | None:
        quota = self._watches.quotas.get(key)
        if quota is None or quota.metadata.deletion_timestamp is not None:
            return None
        return link(_by_ident((fragment(quota),))).policy.quotas.get(key)

    def _endpoint(self, key: Key) -> Endpoint | None:
        endpoint = self._watches.endpoints.get(key)
        if endpoint is None or endpoint.metadata.deletion_timestamp is not None:
            self._refer(key, frozenset())
            return None
        made = fragment(endpoint)
        assert isinstance(made, EndpointFragment)
        references, serves = self._references(endpoint)
        self._refer(key, frozenset((each.kind, each.namespace, each.name) for each in references))
        if not references:
            # Applications that are not ready are no reason to hand the traffic to somebody else's engines.
            return msgspec.structs.replace(made.record, routes=()) if serves else made.record
        fragments: list[Fragment] = [EndpointFragment(made.ident, made.record, references)]
        for reference in references:
            fragments += self._addresses.behind(reference)
        return link(_by_ident(fragments)).policy.endpoints[key]

    def _references(self, endpoint: ArksEndpoint) -> tuple[tuple[RouteRef, ...], bool]:
        """Its backends as its HTTPRoute has them; and whether any application, ready or not, serves it."""
        namespace = endpoint.metadata.namespace
        names = {endpoint.metadata.name, endpoint.spec.model_name or endpoint.metadata.name}
        apps = [app for name in names for app in self._watches.applications.by("served", (namespace, name))]
        pairs = [pair for name in names for pair in self._watches.disaggregated.by("served", (namespace, name))]
        backends = self._weigh(endpoint, discovered(endpoint, apps, pairs))
        references, _ = backend_refs(endpoint, backends)
        return tuple(_reference(each, namespace) for each in references), bool(apps or pairs)

    def _refer(self, key: Key, now: frozenset[tuple[str, str, str]]) -> None:
        before = self._uses.pop(key, frozenset())
        for gone in before - now:
            users = self._users[gone]
            users.discard(key)
            if not users:
                del self._users[gone]
        for come in now - before:
            self._users.setdefault(come, set()).add(key)
        if now:
            self._uses[key] = now

    # -- engines --------------------------------------------------------------------------------------------------

    def engines(self, endpoint: ArksEndpoint, application: str) -> tuple[str, ...]:
        """Addresses behind one application: the pods of its Service that are ready."""
        namespace, service = endpoint.metadata.namespace, service_name(application)
        known = self._engines.get((namespace, service))
        if known is not None:
            return known
        reference = RouteRef("", "Service", namespace, service, SERVING_PORT, 1)
        ident = Ident("ArksEndpoint", namespace, endpoint.metadata.name)
        bare = EndpointFragment(ident, Endpoint(namespace, endpoint.metadata.name, "", None), (reference,))
        made = link(_by_ident((bare, *self._addresses.behind(reference)))).policy.endpoints[ident.key]
        found = tuple(address for route in made.routes or () for address in route.addresses)
        self._engines[namespace, service] = found
        return found


def _served(kind: str, app: Any) -> str:
    if kind == "ArksApplication":
        return served_name(app)
    return str(app.spec.served_model_name or app.spec.model.name)


def _by_ident(fragments: Sequence[Fragment]) -> Mapping[Ident, Fragment]:
    return {each.ident: each for each in fragments}


def _reference(item: Mapping[str, Any], namespace: str) -> RouteRef:
    """A reference as the Gateway API writes it, defaults filled in."""
    return RouteRef(
        item.get("group", ""),
        item.get("kind", "Service"),
        item.get("namespace") or namespace,
        item["name"],
        item.get("port"),
        item.get("weight", 1),
    )
