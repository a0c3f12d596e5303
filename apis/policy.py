"""Compiled policy: what the data plane needs to know of each resource, and nothing else.

One immutable record per resource, cheap to hash, compare and send. The folder source (`extproc.snapshot`) and the
controller's stream both produce these; `apis.compile` makes them from validated `arks.ai/v1` resources.
Secrets are not here: a token is its SHA-256 digest. The records are trees of values, so no collector needs to visit
them (`gc=False`): with 10 000 tokens that is what keeps its pauses short.
"""

from typing import Literal, TypeAlias

import msgspec

RateKind: TypeAlias = Literal["rpm", "rpd", "tpm", "tpd"]
QuotaKind: TypeAlias = Literal["prompt", "response", "total"]
WeightPolicy: TypeAlias = Literal["static", "capacity", "load"]
Key: TypeAlias = tuple[str, str]
"""(namespace, name)"""


class RateLimit(msgspec.Struct, frozen=True, gc=False):
    """`value` requests (rpm, rpd) or tokens (tpm, tpd) per UTC-aligned minute or day."""

    kind: RateKind
    value: int


class QuotaLimit(msgspec.Struct, frozen=True, gc=False):
    """`value` tokens in the life of the quota."""

    kind: QuotaKind
    value: int


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A token may use the endpoint named `endpoint` in the token's own namespace, within these limits."""

    endpoint: str
    rates: tuple[RateLimit, ...] = ()
    quota: str | None = None
    """name of a Quota in the token's namespace"""


class Token(msgspec.Struct, frozen=True, gc=False):
    namespace: str
    name: str
    digest: bytes
    """SHA-256 of the secret, 32 bytes"""
    grants: tuple[Grant, ...] = ()
    expires_at_s: float | None = None
    """Unix time, seconds"""
    disabled: bool = False
    max_concurrent_requests: int | None = None
    priority: int = 0


class Quota(msgspec.Struct, frozen=True, gc=False):
    namespace: str
    name: str
    limits: tuple[QuotaLimit, ...]


class Route(msgspec.Struct, frozen=True, gc=False):
    """One backend of an endpoint: a weight, and the engines that stand behind it."""

    name: str
    weight: int
    addresses: tuple[str, ...]
    """`ip:port`, IPv6 bracketed: exactly as Envoy writes them. Empty: nothing known behind this backend."""
    hosts: tuple[str, ...] = ()
    """`hostname:port` behind this backend: the publisher resolves them into `addresses`, pickers ignore them"""


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One public model of one namespace."""

    namespace: str
    name: str
    model: str
    """the public model name clients send; `name` unless spec.modelName says otherwise"""
    routes: tuple[Route, ...] | None
    """None: the endpoint names no backends of its own, the process's default engines serve it"""
    allowed_engine_fields: tuple[str, ...] = ()
    """body fields that steer the engine's inside and that this endpoint lets clients send; `bootstrap_*` style globs"""
    cache_salt_per_tenant: bool = False
    max_output_tokens: int = 4096
    """the engine's own bound on one answer: what is reserved when the client sets no (or a larger) max_tokens"""
    media_tokens: int = 2048
    """reserved for each image, audio or video part, whatever its encoded size"""
    weight_policy: WeightPolicy = "static"


class Policy(msgspec.Struct, frozen=True):
    """Everything the data plane knows, keyed by (namespace, name)."""

    tokens: dict[Key, Token]
    quotas: dict[Key, Quota]
    endpoints: dict[Key, Endpoint]


EMPTY = Policy(tokens={}, quotas={}, endpoints={})
