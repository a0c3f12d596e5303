"""From validated resources to policy, in two steps.

`fragment` looks at one resource alone, so its result can be kept as long as the resource's text stays the same.
`link` joins fragments: secrets to tokens, backends to routes. It is a few microseconds per token, and it hands out the
previous policy's records wherever they did not change, so that whoever follows sees a change by identity.

Secret values live here only as their SHA-256.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from apis.policy import EMPTY, Endpoint, Grant, Key, Policy, Quota, QuotaLimit, RateLimit, Route, Token
from apis.resources.endpoint import ArksEndpoint
from apis.resources.kubernetes import Backend, EndpointSlice, Secret, Service
from apis.resources.quota import ArksQuota
from apis.resources.token import ArksToken, TokenQos

Record = TypeVar("Record")

ENVOY_GATEWAY_GROUP = "gateway.envoyproxy.io"


class Ident(NamedTuple):
    """Which object: two fragments with one Ident contradict each other."""

    kind: str
    namespace: str
    name: str


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
class TokenFragment:
    ident: Ident
    record: Token
    """its digest is empty where `secret` names where to find it"""
    secret: tuple[str, str] | None
    """(Secret, key) in the token's namespace"""
    remarks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class QuotaFragment:
    ident: Ident
    record: Quota
    remarks: tuple[tuple[str, str], ...] = ()


class RouteRef(NamedTuple):
    group: str
    kind: str
    namespace: str
    name: str
    port: int | None
    weight: int


@dataclass(frozen=True, slots=True)
class EndpointFragment:
    ident: Ident
    record: Endpoint
    refs: tuple[RouteRef, ...]


@dataclass(frozen=True, slots=True)
class SecretFragment:
    ident: Ident
    digests: Mapping[str, bytes]
    """by key, as a client would send the value: without the line end that `echo` leaves in so many Secrets"""


@dataclass(frozen=True, slots=True)
class BackendFragment:
    ident: Ident
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServiceFragment:
    ident: Ident
    ports: Mapping[int, str]
    """port number to port name, by which slices know it"""
    external_name: str


@dataclass(frozen=True, slots=True)
class SliceFragment:
    ident: Ident
    service: Key
    ready: tuple[str, ...]
    """addresses, IPv6 bracketed; host names where `fqdn`"""
    ports: tuple[tuple[str, int], ...]
    fqdn: bool


Fragment: TypeAlias = (
    TokenFragment
    | QuotaFragment
    | EndpointFragment
    | SecretFragment
    | BackendFragment
    | ServiceFragment
    | SliceFragment
)
Source: TypeAlias = ArksToken | ArksQuota | ArksEndpoint | Secret | Backend | Service | EndpointSlice


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


def digest_of(secret: bytes) -> bytes:
    """How a token's secret is held and compared."""
    return hashlib.sha256(secret).digest()


def fragment(resource: Source) -> Fragment:
    """What one resource says by itself."""
    namespace, name = resource.key
    ident = Ident(resource.kind, namespace, name)
    match resource:
        case ArksToken():
            return _token(ident, resource)
        case ArksQuota():
            return _quota(ident, resource)
        case ArksEndpoint():
            return _endpoint(ident, resource)
        case Secret():
            keys = {*resource.data, *resource.string_data}
            return SecretFragment(ident, {key: digest_of((resource.value(key) or b"").rstrip(b"\r\n")) for key in keys})
        case Backend():
            ends = resource.spec.endpoints
            return BackendFragment(
                ident,
                tuple(_join(end.ip.address, end.ip.port) for end in ends if end.ip),
                tuple(f"{end.fqdn.hostname}:{end.fqdn.port}" for end in ends if end.fqdn),
            )
        case Service():
            spec = resource.spec
            external = spec.external_name if spec.type == "ExternalName" else ""
            return ServiceFragment(ident, {port.port: port.name for port in spec.ports}, external)
        case EndpointSlice():
            return SliceFragment(
                ident,
                (namespace, resource.service),
                tuple(_bracket(a) for end in resource.endpoints if end.conditions.ready for a in end.addresses),
                tuple((port.name, port.port) for port in resource.ports if port.port is not None),
                resource.address_type == "FQDN",
            )


def _token(ident: Ident, resource: ArksToken) -> TokenFragment:
    spec = resource.spec
    remarks: list[tuple[str, str]] = []
    grants: dict[str, Grant] = {}
    for index, qos in enumerate(spec.qos):
        endpoint = qos.arks_endpoint.name
        path = f"spec.qos[{index}]"
        if not endpoint:
            remarks.append((f"{path}.arksEndpoint.name", "names no endpoint, so it allows nothing"))
        elif endpoint in grants:
            remarks.append((f"{path}.arksEndpoint.name", f"{endpoint} is listed twice; the first entry counts"))
        else:
            grants[endpoint] = Grant(
                endpoint, _rates(qos, path, remarks), (qos.quota.name or None) if qos.quota else None
            )
    secret: tuple[str, str] | None = None
    if spec.token is not None:
        digest = digest_of(spec.token.encode("utf-8", "surrogatepass"))
    elif spec.token_hash is not None:
        digest = bytes.fromhex(spec.token_hash.removeprefix("sha256:"))
    else:
        assert spec.token_secret_ref is not None
        digest, secret = b"", (spec.token_secret_ref.name, spec.token_secret_ref.key)
    record = Token(
        namespace=ident.namespace,
        name=ident.name,
        digest=digest,
        grants=tuple(grants.values()),
        expires_at_s=spec.expires_at.timestamp() if spec.expires_at else None,
        disabled=spec.disabled,
        max_concurrent_requests=spec.max_concurrent_requests,
        priority=spec.priority,
    )
    return TokenFragment(ident, record, secret, tuple(remarks))


def _rates(qos: TokenQos, path: str, remarks: list[tuple[str, str]]) -> tuple[RateLimit, ...]:
    """One limit per kind: two would share one counter, so only the smaller can ever bind."""
    found: dict[str, RateLimit] = {}
    for index, limit in enumerate(qos.rate_limits):
        known = found.get(limit.type)
        if known is not None:
            remarks.append((f"{path}.rateLimits[{index}]", f"{limit.type} is listed twice; the smaller value counts"))
        if known is None or limit.value < known.value:
            found[limit.type] = RateLimit(limit.type, limit.value)
    return tuple(found.values())


def _quota(ident: Ident, resource: ArksQuota) -> QuotaFragment:
    remarks: list[tuple[str, str]] = []
    found: dict[str, QuotaLimit] = {}
    for index, limit in enumerate(resource.spec.quotas):
        known = found.get(limit.type)
        if known is not None:
            remarks.append((f"spec.quotas[{index}]", f"{limit.type} is listed twice; the smaller value counts"))
        if known is None or limit.value < known.value:
            found[limit.type] = QuotaLimit(limit.type, limit.value)
    return QuotaFragment(ident, Quota(ident.namespace, ident.name, tuple(found.values())), tuple(remarks))


def _endpoint(ident: Ident, resource: ArksEndpoint) -> EndpointFragment:
    spec = resource.spec
    record = Endpoint(
        namespace=ident.namespace,
        name=ident.name,
        model=spec.model_name or ident.name,
        routes=None,
        allowed_engine_fields=tuple(spec.allowed_engine_fields),
        cache_salt_per_tenant=spec.cache_salt_per_tenant,
        max_output_tokens=spec.max_output_tokens,
        media_tokens=spec.media_tokens,
        weight_policy=spec.weight_policy,
    )
    refs = tuple(
        RouteRef(ref.group, ref.kind, ref.namespace or ident.namespace, ref.name, ref.port, ref.weight)
        for ref in spec.route_configs
    )
    return EndpointFragment(ident, record, refs)


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
                    tokens[made.ident[1:]] = made.record
                else:
                    held.append(made)
                if made.remarks:
                    notes += (Remark(made.ident, path, text) for path, text in made.remarks)
            case QuotaFragment():
                quotas[made.ident[1:]] = made.record
                notes += (Remark(made.ident, path, text) for path, text in made.remarks)
            case EndpointFragment():
                if made.refs:
                    routed.append(made)
                else:
                    endpoints[made.ident[1:]] = made.record
            case SliceFragment():
                slices[made.service].append(made)
            case _:
                pass
    for holder in held:
        token = _unsealed(holder, fragments, problems)
        if token is not None:
            tokens[holder.ident[1:]] = token
    for target in routed:
        record = _routed(target, fragments, slices, notes)
        endpoints[target.ident[1:]] = record
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


_EMPTY_DIGEST = digest_of(b"")


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


def _join(address: str, port: int) -> str:
    return f"{_bracket(address)}:{port}"


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address
