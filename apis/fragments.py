"""What one resource says by itself, compiled: the first half of the way from resources to policy.

A fragment depends on its resource's text alone, so it can be kept as long as that stays the same. Secret values live
here only as their SHA-256. Fragments are kept by the ten thousand and hold no cycles: no collector visits them.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from apis.policy import Endpoint, Grant, Key, Quota, QuotaLimit, RateLimit, Token
from apis.resources.endpoint import ArksEndpoint
from apis.resources.kubernetes import Backend, EndpointSlice, Secret, Service
from apis.resources.quota import ArksQuota
from apis.resources.token import ArksToken, TokenQos


class Ident(msgspec.Struct, frozen=True, gc=False):
    """Which object: two fragments with one Ident contradict each other."""

    kind: str
    namespace: str
    name: str

    @property
    def key(self) -> Key:
        return (self.namespace, self.name)


class TokenFragment(msgspec.Struct, frozen=True, gc=False):
    ident: Ident
    record: Token
    """its digest is empty where `secret` names where to find it"""
    secret: tuple[str, str] | None
    """(Secret, key) in the token's namespace"""
    remarks: tuple[tuple[str, str], ...] = ()


class QuotaFragment(msgspec.Struct, frozen=True, gc=False):
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


class EndpointFragment(msgspec.Struct, frozen=True, gc=False):
    ident: Ident
    record: Endpoint
    refs: tuple[RouteRef, ...]


class SecretFragment(msgspec.Struct, frozen=True, gc=False):
    ident: Ident
    digests: Mapping[str, bytes]
    """by key, as a client would send the value: without the line end that `echo` leaves in so many Secrets"""


class BackendFragment(msgspec.Struct, frozen=True, gc=False):
    ident: Ident
    addresses: tuple[str, ...]
    hosts: tuple[str, ...]


class ServiceFragment(msgspec.Struct, frozen=True, gc=False):
    ident: Ident
    ports: Mapping[int, str]
    """port number to port name, by which slices know it"""
    external_name: str


class SliceFragment(msgspec.Struct, frozen=True, gc=False):
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


def _join(address: str, port: int) -> str:
    return f"{_bracket(address)}:{port}"


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address
