"""ArksEndpoint: the HTTPRoute that carries its traffic once extproc has named tenant and model.

extproc sets the headers ``namespace`` and ``model`` (the endpoint's own name); every match demands both, so
nothing else ever reaches an engine through our routes. The default match lists the paths of the OpenAI API and
its neighbours one by one: a bare ``/`` would lose to the Gateway's reserved routes, whose paths are longer, and
would open the engines' own administration to token holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apis.resources import ArksApplication, ArksDisaggregatedApplication, ArksEndpoint
from apis.resources.gatewayapi import HTTPRouteMatch
from controller.engines.model import SERVING_PORT, Problem
from controller.reconcile.desired.application import served_name
from controller.reconcile.desired.metadata import (
    ENDPOINT_LABEL,
    LABEL_MAX,
    MANAGED_BY,
    object_metadata,
    owned_by,
    plain,
)
from controller.reconcile.desired.service import service_name
from controller.workloads.model import Object

API_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/score",
    "/v1/audio",
    "/v1/images",
    "/v1/moderations",
    "/v1/tokenize",
    "/rerank",
    "/score",
    "/classify",
    "/pooling",
    "/tokenize",
    "/detokenize",
)
MAX_BACKENDS = 16
MAX_HEADERS = 16
MAX_WEIGHT = 1_000_000
_OURS = ("namespace", "model")


@dataclass(frozen=True, slots=True)
class Backend:
    """One application behind an endpoint; ``weight`` is what the route shall say, ``ready`` its replicas."""

    application: str
    weight: int
    ready: int = 1


def discovered(
    endpoint: ArksEndpoint,
    applications: Iterable[ArksApplication],
    disaggregated: Iterable[ArksDisaggregatedApplication],
) -> tuple[Backend, ...]:
    """Applications that serve the endpoint's model and have something ready, with weights as the policy says.

    ``load`` starts from ``capacity``; whoever follows the load overwrites the weights of what this returns.
    """
    found: list[Backend] = []
    by_capacity = endpoint.spec.weight_policy != "static"

    def add(name: str, ready: int) -> None:
        if ready > 0:
            weight = endpoint.spec.default_weight * (ready if by_capacity else 1)
            found.append(Backend(name, min(weight, MAX_WEIGHT), ready))

    for app in applications:
        if _belongs(endpoint, app.metadata.namespace, served_name(app)) and app.metadata.deletion_timestamp is None:
            add(app.metadata.name, app.status.ready_replicas)
    for pair in disaggregated:
        name = pair.spec.served_model_name or pair.spec.model.name
        if _belongs(endpoint, pair.metadata.namespace, name) and pair.metadata.deletion_timestamp is None:
            add(pair.metadata.name, disaggregated_ready(pair))
    return tuple(sorted(found, key=lambda item: item.application))


def disaggregated_ready(app: ArksDisaggregatedApplication) -> int:
    """Prefill and decode in step: as many whole pipelines as the scarcer half allows, none without a router."""
    status = app.status
    if not (status.router and status.prefill and status.decode) or status.router.ready_replicas == 0:
        return 0
    return min(status.prefill.ready_replicas, status.decode.ready_replicas)


def _belongs(endpoint: ArksEndpoint, namespace: str, name: str) -> bool:
    return namespace == endpoint.metadata.namespace and name in (endpoint.metadata.name, endpoint.spec.model_name)


def backend_refs(endpoint: ArksEndpoint, backends: Sequence[Backend]) -> tuple[list[Object], tuple[Problem, ...]]:
    """The user's references as they are, then the applications they do not name; 16 are the API's limit."""
    given = [plain(item) for item in endpoint.spec.route_configs]
    references = [{key: value for key, value in item.items() if value != []} for item in given]
    named = {item["name"] for item in references if item.get("kind", "Service") == "Service"}
    ranked = sorted(backends, key=lambda item: (-item.weight, item.application))
    mine = [item for item in ranked if service_name(item.application) not in named]
    room = MAX_BACKENDS - len(references)
    kept = sorted(mine[:room], key=lambda item: item.application)
    references += [
        {
            "group": "",
            "kind": "Service",
            "name": service_name(item.application),
            "port": SERVING_PORT,
            "weight": item.weight,
        }
        for item in kept
    ]
    left = [item.application for item in mine[room:]]
    if not left:
        return references, ()
    text = f"a route holds {MAX_BACKENDS} backends; without traffic by weight stay {', '.join(sorted(left))}"
    return references, (Problem("TooManyBackends", "spec.routeConfigs", text, blocking=False),)


def matches(endpoint: ArksEndpoint) -> tuple[list[Object], tuple[Problem, ...]]:
    """Every match with both headers; no list of matches, however empty, ends in a route without them."""
    headers = [
        {"type": "Exact", "name": "namespace", "value": endpoint.metadata.namespace},
        {"type": "Exact", "name": "model", "value": endpoint.metadata.name},
    ]
    given = endpoint.spec.match_configs
    if not given or (len(given) == 1 and _everything(given[0])):
        paths = [{"path": {"type": "PathPrefix", "value": path}, "headers": headers} for path in API_PATHS]
        return paths, ()
    found: list[Object] = []
    problems: list[Problem] = []
    for index, item in enumerate(given):
        match = plain(item)
        own = [header for header in match.get("headers", []) if header["name"].lower() not in _OURS]
        if len(own) + len(headers) > MAX_HEADERS:
            path = f"spec.matchConfigs[{index}].headers"
            text = f"at most {MAX_HEADERS - len(headers)} headers fit beside the two that name tenant and model"
            problems.append(Problem("TooManyHeaders", path, text))
        match["headers"] = [*own, *headers]
        found.append({key: value for key, value in match.items() if value not in ([], None)})
    return found, tuple(problems)


def _everything(match: HTTPRouteMatch) -> bool:
    return match == HTTPRouteMatch()


@dataclass(frozen=True, slots=True)
class DesiredEndpoint:
    """``route`` is None with a blocking problem; ``routes`` is what the status shows."""

    route: Object | None
    routes: tuple[Object, ...] = ()
    problems: tuple[Problem, ...] = ()


def desired_endpoint(
    endpoint: ArksEndpoint, backends: Sequence[Backend], existing: Object | None = None
) -> DesiredEndpoint:
    """``existing`` is the HTTPRoute of the endpoint's name, if there is one."""
    if existing is not None and not _may_take(endpoint, existing):
        text = f"an HTTPRoute {endpoint.metadata.name!r} that is not ours stands in the way; rename one of them"
        return DesiredEndpoint(None, problems=(Problem("RouteConflict", "metadata.name", text),))
    found, bad = matches(endpoint)
    references, full = backend_refs(endpoint, backends)
    problems = (*bad, *full)
    if any(problem.blocking for problem in problems):
        return DesiredEndpoint(None, problems=problems)
    named = {ENDPOINT_LABEL: endpoint.metadata.name}
    labels = {**(named if len(endpoint.metadata.name) <= LABEL_MAX else {}), **MANAGED_BY}
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": object_metadata(endpoint, endpoint.metadata.name, labels),
        "spec": {
            "parentRefs": [plain(endpoint.spec.gateway_ref)],
            # A generation may take an hour. Zero switches the limit off; without it Envoy's is 15 seconds.
            "rules": [{"matches": found, "backendRefs": references, "timeouts": {"request": "0s"}}],
        },
    }
    return DesiredEndpoint(route, tuple(references), problems)


def _may_take(endpoint: ArksEndpoint, route: Object) -> bool:
    """Ours by owner, or made by Arks: it left no owner, but each match names our tenant and model."""
    if owned_by(route, endpoint):
        return True
    if route["metadata"].get("ownerReferences"):
        return False
    wanted = {"namespace": endpoint.metadata.namespace, "model": endpoint.metadata.name}
    found = [match for rule in route["spec"].get("rules", ()) for match in rule.get("matches", ())]
    return bool(found) and all(
        wanted.items() <= {header["name"]: header["value"] for header in match.get("headers", ())}.items()
        for match in found
    )
