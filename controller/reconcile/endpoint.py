"""ArksEndpoint: its HTTPRoute, which backends it has, and whether a Gateway carries it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apis.resources import ArksEndpoint
from apis.resources.gatewayapi import ParentReference
from controller.engines.model import Problem
from controller.kube.client import Object
from controller.kube.errors import ForbiddenError
from controller.kube.resource import Key
from controller.reconcile.context import RESYNC_S, UNSETTLED_S, Context, about
from controller.reconcile.desired.endpoint import Backend, DesiredEndpoint, desired_endpoint, discovered
from controller.reconcile.desired.metadata import owner_reference
from controller.reconcile.desired.phase import Verdict
from controller.reconcile.finalizers import is_ours, release
from controller.reconcile.kinds import ARKS, GATEWAY_API
from controller.reconcile.writing import REFUSED_AGAIN_S, Refusal, left_by_namesake
from controller.workloads.model import Deletion

_RESOURCE = ARKS["ArksEndpoint"]


async def reconcile_endpoint(context: Context, key: Key) -> float | None:
    watches = context.watches
    entry = watches.endpoints.entry(key)
    if entry is None:
        context.status.forget(_RESOURCE, *key)
        return None
    endpoint = entry.value
    if endpoint.metadata.deletion_timestamp is not None:
        if any(map(is_ours, endpoint.metadata.finalizers)):
            await _remove_route(context, endpoint)
            await release(context.client, _RESOURCE, *key, endpoint.metadata.finalizers, entry.version)
        return None
    if not watches.settled:
        return UNSETTLED_S
    route = watches.routes.get(key)
    backends = _backends(context, endpoint)
    judged = route is not None and not left_by_namesake(route, owner_reference(endpoint))
    desired = desired_endpoint(endpoint, backends, route if judged else None)
    refusal: Refusal | None = None
    if desired.route is not None and watches.serves(GATEWAY_API, "HTTPRoute"):
        refusal = await context.writer.apply(endpoint.metadata.uid, desired.route, trusted=route is not None)
    verdicts = [
        _accepted(desired, refusal),
        _programmed(context, endpoint, desired, route, refusal),
        *_notes(context, endpoint, desired),
    ]
    told = about(endpoint, entry.version)
    live = [_without_empty(item) for item in told.status.get("routes", ())]
    # What the route says now: a refused change leaves the old one in force.
    routes = list(desired.routes) if desired.route is not None and refusal is None else live if route else []
    status: dict[str, Any] = {"routes": routes} if routes else {}
    await context.status.write(replace(told, status={**told.status, "routes": live}), verdicts, status)
    return REFUSED_AGAIN_S if refusal is not None else RESYNC_S


def _without_empty(reference: Object) -> Object:
    return {key: value for key, value in reference.items() if value != []}


def _backends(context: Context, endpoint: ArksEndpoint) -> tuple[Backend, ...]:
    watches = context.watches
    namespace = endpoint.metadata.namespace
    names = {endpoint.metadata.name, endpoint.spec.model_name or endpoint.metadata.name}
    apps = [app for name in names for app in watches.applications.by("served", (namespace, name))]
    pairs = [pair for name in names for pair in watches.disaggregated.by("served", (namespace, name))]
    return tuple(context.weigh(endpoint, discovered(endpoint, apps, pairs)))


async def _remove_route(context: Context, endpoint: ArksEndpoint) -> None:
    """Arks' routes have no owner, so nobody else collects them. What is not ours stays."""
    route = context.watches.routes.get(Key(endpoint.metadata.namespace, endpoint.metadata.name))
    if route is None or desired_endpoint(endpoint, (), route).route is None:
        return
    meta = route["metadata"]
    gone = Deletion(route["apiVersion"], route["kind"], meta["namespace"], meta["name"])
    try:
        await context.writer.delete(gone)
    except ForbiddenError:
        return  # a right that we lack must not make the deletion hang


def _accepted(desired: DesiredEndpoint, refusal: Refusal | None) -> Verdict:
    blocking = next((problem for problem in desired.problems if problem.blocking), None)
    if blocking is not None:
        return Verdict("Accepted", "False", blocking.reason, str(blocking))
    if refusal is not None:
        return Verdict("Accepted", "False", "RouteRefused", refusal.told("spec"))
    return Verdict("Accepted", "True", "Accepted", "The endpoint is valid")


def _programmed(
    context: Context, endpoint: ArksEndpoint, desired: DesiredEndpoint, route: Object | None, refusal: Refusal | None
) -> Verdict:
    if not context.watches.serves(GATEWAY_API, "HTTPRoute"):
        text = "spec.gatewayRef: Gateway API is not installed in this cluster"
        return Verdict("Programmed", "False", "GatewayApiMissing", text)
    if desired.route is None or refusal is not None:
        return Verdict("Programmed", "False", "NotAccepted", "there is no route: the endpoint was not accepted")
    reference = endpoint.spec.gateway_ref
    gateway = _gateway_key(endpoint)
    is_gateway = (reference.group, reference.kind) == (GATEWAY_API, "Gateway")
    if is_gateway and gateway not in context.watches.gateways:
        return Verdict("Programmed", "False", "NoGateway", f"spec.gatewayRef.name: there is no Gateway {gateway}")
    carrying = [item for item in desired.routes if item.get("weight", 1) > 0]
    if not carrying:
        if desired.routes:
            field = "spec.routeConfigs" if endpoint.spec.route_configs else "spec.defaultWeight"
            text = f"{field}: all backends have the weight 0, so no traffic is carried"
            return Verdict("Programmed", "False", "NoBackends", text)
        names = " or ".join(sorted({endpoint.metadata.name, endpoint.spec.model_name or endpoint.metadata.name}))
        text = f"no application that serves {names} is ready in this namespace, and spec.routeConfigs names none"
        return Verdict("Programmed", "False", "NoBackends", text)
    return _told_by_the_gateway(endpoint, route, gateway)


def _told_by_the_gateway(endpoint: ArksEndpoint, route: Object | None, gateway: Key) -> Verdict:
    parents = ((route or {}).get("status") or {}).get("parents") or ()
    mine = [each for each in parents if _same_parent(each.get("parentRef") or {}, endpoint, gateway)]
    said = {each["type"]: each for parent in mine for each in parent.get("conditions") or ()}
    for type_ in ("Accepted", "ResolvedRefs"):
        found = said.get(type_)
        if found is not None and found["status"] == "False":
            text = f"the Gateway {gateway} says {type_}=False: {found.get('message', '')}"
            return Verdict("Programmed", "False", found.get("reason", type_), text)
    if "Accepted" not in said:
        text = f"the route is made; the controller of Gateway {gateway} has not answered yet"
        return Verdict("Programmed", "Unknown", "Waiting", text)
    return Verdict("Programmed", "True", "Programmed", f"Gateway {gateway} carries the route")


def _same_parent(given: Object, endpoint: ArksEndpoint, gateway: Key) -> bool:
    reference: ParentReference = endpoint.spec.gateway_ref
    namespace = given.get("namespace") or endpoint.metadata.namespace
    return (namespace, given.get("name")) == gateway and given.get("sectionName") == reference.section_name


def _gateway_key(endpoint: ArksEndpoint) -> Key:
    reference = endpoint.spec.gateway_ref
    return Key(reference.namespace or endpoint.metadata.namespace, reference.name)


def _notes(context: Context, endpoint: ArksEndpoint, desired: DesiredEndpoint) -> list[Verdict]:
    """What is wrong and stops nothing."""
    problems = [problem for problem in desired.problems if not problem.blocking]
    model = endpoint.spec.model_name or endpoint.metadata.name
    meta = endpoint.metadata
    for other in context.watches.endpoints.by("model", (meta.namespace, model)):
        same = (other.spec.model_name or other.metadata.name) == model
        if same and other.metadata.name < meta.name:
            text = f"ArksEndpoint {other.metadata.name} serves {model} too and comes first"
            problems.append(Problem("ModelNameTaken", "spec.modelName", text, blocking=False))
            break
    if not problems:
        return []
    return [Verdict("Degraded", "True", problems[0].reason, "; ".join(map(str, problems)))]
