"""From validated resources to policy: `fragment` each one, then `link` them all.

`link` joins what belongs together: secrets to tokens, backends to routes. It costs a microsecond or two per token, and
hands out the previous policy's records wherever they did not change: whoever follows sees a change by identity.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from apis.fragments import (
    BackendFragment,
    EndpointFragment,
    Fragment,
    Ident,
    QuotaFragment,
    RouteRef,
    SecretFragment,
    ServiceFragment,
    SliceFragment,
    Source,
    TokenFragment,
    digest_of,
    fragment,
)
from apis.policy import EMPTY, Endpoint, Key, Policy, Quota, Route, Token

Record = TypeVar("Record")

ENVOY_GATEWAY_GROUP: Final = "gateway.envoyproxy.io"
_EMPTY_DIGEST: Final = digest_of(b"")


class Remark(NamedTuple):
    """Something to tell about an object: where in it, and what."""

    ident: Ident
    path: str
    text: str


class Problem(NamedTuple):
    """An object that cannot take effect, and what to do."""

    ident: Ident
    path: str
    text: str
    fix: str


@dataclass(frozen=True, slots=True)
class Linked:
    policy: Policy
    problems: tuple[Problem, ...]
    """objects that are not in the policy, each with its reason"""
    notes: tuple[Remark, ...]
    """objects that are, with something their author should know"""


def compile_policy(resources: Iterable[Source], previous: Policy = EMPTY) -> Linked:
    """Both steps at once. Of two resources with one kind and key, the last wins."""
    return link({(made := fragment(resource)).ident: made for resource in resources}, previous)


def link(fragments: Mapping[Ident, Fragment], previous: Policy = EMPTY) -> Linked:
    """Join what belongs together. Records equal to `previous`'s are `previous`'s own."""
    tokens: dict[Key, Token] = {}
    quotas: dict[Key, Quota] = {}
    endpoints: dict[Key, Endpoint] = {}
    problems: list[Problem] = []
    notes: list[Remark] = []
    slices: defaultdict[Key, list[SliceFragment]] = defaultdict(list)
    held: list[TokenFragment] = []
    routed: list[EndpointFragment] = []
    for made in fragments.values():
        match made:
            case TokenFragment():
                if made.secret is None:
                    tokens[made.ident.key] = made.record
                else:
                    held.append(made)
                if made.remarks:
                    notes += (Remark(made.ident, path, text) for path, text in made.remarks)
            case QuotaFragment():
                quotas[made.ident.key] = made.record
                notes += (Remark(made.ident, path, text) for path, text in made.remarks)
            case EndpointFragment():
                if made.refs:
                    routed.append(made)
                else:
                    endpoints[made.ident.key] = made.record
            case SliceFragment():
                slices[made.service].append(made)
            case _:
                pass
    for holder in held:
        token = _unsealed(holder, fragments, problems)
        if token is not None:
            tokens[holder.ident.key] = token
    for target in routed:
        record = _routed(target, fragments, slices, notes)
        endpoints[target.ident.key] = record
    policy = Policy(
        tokens=_reused(tokens, previous.tokens),
        quotas=_reused(quotas, previous.quotas),
        endpoints=_reused(endpoints, previous.endpoints),
    )
    notes += _dangling(policy)
    return Linked(policy, tuple(problems), tuple(notes))


def _unsealed(holder: TokenFragment, fragments: Mapping[Ident, Fragment], problems: list[Problem]) -> Token | None:
    assert holder.secret is not None
    name, key = holder.secret
    found = fragments.get(Ident("Secret", holder.ident.namespace, name))
    if not isinstance(found, SecretFragment):
        problems.append(
            Problem(
                holder.ident,
                "spec.tokenSecretRef.name",
                f"there is no Secret {name} in namespace {holder.ident.namespace}",
                "add the Secret beside the token, in the same namespace",
            )
        )
        return None
    digest = found.digests.get(key)
    if digest is None or digest == _EMPTY_DIGEST:
        problems.append(
            Problem(
                holder.ident,
                "spec.tokenSecretRef.key",
                f"the Secret {name} has {'no key' if digest is None else 'nothing under the key'} {key}",
                "name a key of the Secret's data or stringData that holds the token",
            )
        )
        return None
    record = holder.record
    return Token(
        namespace=record.namespace,
        name=record.name,
        digest=digest,
        grants=record.grants,
        expires_at_s=record.expires_at_s,
        disabled=record.disabled,
        max_concurrent_requests=record.max_concurrent_requests,
        priority=record.priority,
    )


def _routed(
    target: EndpointFragment,
    fragments: Mapping[Ident, Fragment],
    slices: Mapping[Key, list[SliceFragment]],
    notes: list[Remark],
) -> Endpoint:
    routes = []
    for index, ref in enumerate(target.refs):
        found = _behind(ref, fragments, slices)
        if isinstance(found, str):
            notes.append(Remark(target.ident, f"spec.routeConfigs[{index}]", found))
            found = ((), ())
        routes.append(Route(ref.name, ref.weight, *found))
    values = {name: getattr(target.record, name) for name in target.record.__struct_fields__}
    return Endpoint(**{**values, "routes": tuple(routes)})


def _behind(
    ref: RouteRef, fragments: Mapping[Ident, Fragment], slices: Mapping[Key, list[SliceFragment]]
) -> tuple[tuple[str, ...], tuple[str, ...]] | str:
    """(addresses, hosts) of a reference, or why there are none."""
    where = f"{ref.namespace}/{ref.name}"
    if (ref.group, ref.kind) == (ENVOY_GATEWAY_GROUP, "Backend"):
        backend = fragments.get(Ident("Backend", ref.namespace, ref.name))
        if not isinstance(backend, BackendFragment):
            return f"there is no Backend {where}, so nothing stands behind this route"
        return backend.addresses, backend.hosts
    if (ref.group, ref.kind) != ("", "Service"):
        return f"backends of kind {ref.kind} are not understood, so nothing stands behind this route"
    service = fragments.get(Ident("Service", ref.namespace, ref.name))
    if not isinstance(service, ServiceFragment):
        return f"there is no Service {where}, so nothing stands behind this route"
    if service.external_name:
        return (), (f"{service.external_name}:{ref.port}",)
    port_name = service.ports.get(ref.port or 0)
    if port_name is None:
        return f"the Service {where} has no port {ref.port}, so nothing stands behind this route"
    addresses: dict[str, None] = {}
    hosts: dict[str, None] = {}
    for part in slices.get((ref.namespace, ref.name), ()):
        for name, port in part.ports:
            if name == port_name:
                (hosts if part.fqdn else addresses).update((f"{address}:{port}", None) for address in part.ready)
    if not addresses and not hosts:
        return f"no EndpointSlice gives a ready address for the Service {where} port {ref.port}"
    return tuple(addresses), tuple(hosts)


def _reused(now: dict[Key, Record], before: Mapping[Key, Record]) -> dict[Key, Record]:
    for key, record in now.items():
        known = before.get(key)
        if known is not None and known is not record and known == record:
            now[key] = known
    return now


def _dangling(policy: Policy) -> Iterable[Remark]:
    """References that refuse requests until what they name is there."""
    endpoints, quotas = policy.endpoints, policy.quotas
    for (namespace, name), token in policy.tokens.items():
        for grant in token.grants:
            ident = None
            if (namespace, grant.endpoint) not in endpoints:
                ident = Ident("ArksToken", namespace, name)
                yield Remark(
                    ident, "spec.qos", f"there is no ArksEndpoint {namespace}/{grant.endpoint}; its model is refused"
                )
            if grant.quota is not None and (namespace, grant.quota) not in quotas:
                ident = ident or Ident("ArksToken", namespace, name)
                yield Remark(
                    ident, "spec.qos", f"there is no ArksQuota {namespace}/{grant.quota}; {grant.endpoint} is refused"
                )
    first: dict[Key, str] = {}
    for (namespace, name), endpoint in sorted(policy.endpoints.items()):
        known = first.setdefault((namespace, endpoint.model), name)
        if known != name:
            yield Remark(
                Ident("ArksEndpoint", namespace, name),
                "spec.modelName",
                f"ArksEndpoint {known} serves {endpoint.model} too; a token for both gets the one its qos lists first",
            )
