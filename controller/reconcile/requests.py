"""Which resources a change concerns: the edges along which the loop is triggered.

Every edge is a lookup in an index, never a walk over all objects. Too many requests are harmless, for a pass without
a difference writes nothing; a missing one leaves a resource with yesterday's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from apis.resources import ArksModel
from controller.kube.client import Object
from controller.kube.resource import Key
from controller.reconcile.desired.application import served_name
from controller.reconcile.kinds import APPLICATION_KINDS, ARKS, Request
from controller.reconcile.objects import owners
from controller.reconcile.watches import Watches, applications_of
from controller.workloads.model import APPLICATION_LABEL, MODEL_LABEL

OWNED: Final = frozenset(
    {
        "Deployment",
        "HTTPRoute",
        "Job",
        "LeaderWorkerSet",
        "PersistentVolumeClaim",
        "Role",
        "RoleBinding",
        "RoleBasedGroup",
        "RoleBasedGroupSet",
        "Service",
        "ServiceAccount",
    }
)


def requests(watches: Watches, kind: str, key: Key, new: Any, old: Any) -> Iterator[Request]:
    """New and old form of the object; either may be None. An empty kind: the served kinds have changed."""
    if not kind:
        yield from everything(watches, frozenset({*APPLICATION_KINDS, "ArksEndpoint"}))
        return
    if kind in ARKS:
        yield Request(kind, *key)
        yield from _of_ours(watches, kind, key, new, old)
    elif kind in OWNED:
        yield from _of_owned(watches, kind, key, new, old)
    else:
        yield from _of_others(watches, kind, key, new, old)


def everything(watches: Watches, kinds: frozenset[str] = frozenset(ARKS)) -> Iterator[Request]:
    for kind in ARKS:
        if kind in kinds:
            store = watches.reflectors[kind].store
            yield from (Request(kind, *key) for key in store)
            yield from (Request(kind, *key) for key in watches.reflectors[kind].malformed)


def _of_ours(watches: Watches, kind: str, key: Key, new: Any, old: Any) -> Iterator[Request]:
    appeared_or_went = new is None or old is None
    match kind:
        case "ArksModel":
            yield from (Request("ArksApplication", *each) for each in watches.applications.keys_by("model", tuple(key)))
            pairs = watches.disaggregated.keys_by("model", tuple(key))
            yield from (Request("ArksDisaggregatedApplication", *each) for each in pairs)
        case "ArksApplication" | "ArksDisaggregatedApplication":
            # Both names: an endpoint that lost its application must hear of it, too.
            names = {_serves(kind, item) for item in (new, old) if item is not None}
            for name in names:
                yield from _endpoints(watches, (key.namespace, name))
        case "ArksEndpoint":
            if appeared_or_went:
                yield from _tokens(watches, "endpoint", tuple(key))
            names = {item.spec.model_name or item.metadata.name for item in (new, old) if item is not None}
            for name in names:
                yield from (each for each in _endpoints(watches, (key.namespace, name)) if each.name != key.name)
        case "ArksQuota":
            if appeared_or_went:
                yield from _tokens(watches, "quota", key.name)
        case _:
            pass


def _of_owned(watches: Watches, kind: str, key: Key, new: Any, old: Any) -> Iterator[Request]:
    found: set[Request] = set()
    for item in (new, old):
        if item is None:
            continue
        found |= {Request(o["kind"], key.namespace, o["name"]) for o in owners(item) if o["kind"] in ARKS}
        found |= {Request(app, *where) for where in applications_of(item) for app in APPLICATION_KINDS}
        if kind == "RoleBasedGroupSet":
            # Its groups become ours when it goes.
            found |= {Request(app, *key) for app in APPLICATION_KINDS}
    if kind == "HTTPRoute":
        found.add(Request("ArksEndpoint", *key))
    if kind == "PersistentVolumeClaim":
        found |= {Request("ArksModel", *each) for each in watches.models.keys_by("claim", tuple(key))}
    yield from (request for request in found if _known(watches, request))


def _of_others(watches: Watches, kind: str, key: Key, new: Any, old: Any) -> Iterator[Request]:
    match kind:
        case "Pod":
            yield from _of_pod(watches, new if new is not None else old)
        case "Gateway":
            yield from (Request("ArksEndpoint", *each) for each in watches.endpoints.keys_by("gateway", tuple(key)))
        case "Secret":
            yield from _tokens(watches, "secret", tuple(key))
            yield from (Request("ArksModel", *each) for each in watches.models.keys_by("secret", tuple(key)))
        case "Node":
            if _node_matters(new) != _node_matters(old):
                yield from (Request("ArksModel", *each) for each, model in watches.models.items() if _preloads(model))
        case _:
            pass


def _of_pod(watches: Watches, pod: Object) -> Iterator[Request]:
    labels, namespace = pod["metadata"].get("labels") or {}, pod["metadata"].get("namespace", "")
    if APPLICATION_LABEL in labels:
        found = [Request(kind, namespace, labels[APPLICATION_LABEL]) for kind in APPLICATION_KINDS]
    else:
        found = [Request("ArksModel", namespace, labels.get(MODEL_LABEL, ""))]
    yield from (request for request in found if _known(watches, request))


def _node_matters(node: Object | None) -> object:
    """What of a node decides about copies: not the heartbeat that every kubelet writes."""
    if node is None:
        return None
    ready = [each["status"] for each in node["status"]["conditions"]]
    return node["metadata"]["labels"], node["spec"]["unschedulable"], ready


def _preloads(model: ArksModel) -> bool:
    return model.spec.preload is not None


def _serves(kind: str, app: Any) -> str:
    return served_name(app) if kind == "ArksApplication" else app.spec.served_model_name or app.spec.model.name


def _endpoints(watches: Watches, model: tuple[str, str]) -> Iterator[Request]:
    yield from (Request("ArksEndpoint", *each) for each in watches.endpoints.keys_by("model", model))


def _tokens(watches: Watches, index: str, value: Any) -> Iterator[Request]:
    yield from (Request("ArksToken", *each) for each in watches.tokens.keys_by(index, value))


def _known(watches: Watches, request: Request) -> bool:
    return request.key in watches.reflectors[request.kind].store
