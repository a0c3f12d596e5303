"""The parts of Gateway API v1 that ArksEndpoint embeds: parent references, HTTP matches, backend references.

Names, bounds and defaults are Gateway API's own (gateway.networking.k8s.io, standard channel 1.2). Filters pass
through: the API server checks them again in the HTTPRoute that is made from them.
"""

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from apis.resources.base import DNS_LABEL, DNS_SUBDOMAIN, SERVED, Int32, Model, Port, cel

Group: TypeAlias = Annotated[str, Field(max_length=253, pattern="^$|" + DNS_SUBDOMAIN)]
Kind: TypeAlias = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")]
ObjectName: TypeAlias = Annotated[str, Field(min_length=1, max_length=253)]
Namespace: TypeAlias = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
HeaderName: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9!#$%&'*+\-.^_\x60|~]+$")
]
MatchType: TypeAlias = Literal["Exact", "RegularExpression"]

_BY_NAME: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


class ParentReference(Model):
    """The Gateway that the endpoint's route attaches to."""

    group: Group = "gateway.networking.k8s.io"
    kind: Kind = "Gateway"
    name: ObjectName
    namespace: Namespace | None = None
    port: Port | None = None
    section_name: Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)] | None = None


_LITERAL = "self.type in ['Exact', 'PathPrefix']"
_PATH_CHARS = r"^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$"
_PATH_FORBIDDEN = ("//", "/./", "/../", "%2f", "%2F", "#")
_PATH_FORBIDDEN_ENDS = ("/..", "/.")


_PATH_RULES: list[Any] = [
    cel(f"!({_LITERAL}) || self.value.startsWith('/')", "an exact path or a prefix must begin with /"),
    *(
        cel(f"!({_LITERAL}) || !self.value.contains('{part}')", f"an exact path or a prefix holds no {part}")
        for part in _PATH_FORBIDDEN
    ),
    *(
        cel(f"!({_LITERAL}) || !self.value.endsWith('{end}')", f"an exact path or a prefix ends not in {end}")
        for end in _PATH_FORBIDDEN_ENDS
    ),
    cel(
        f'!({_LITERAL}) || self.value.matches(r"""{_PATH_CHARS}""")',
        "an exact path or a prefix holds only the characters of a URL path",
    ),
]


class HTTPPathMatch(Model):
    model_config = ConfigDict(json_schema_extra={"x-kubernetes-validations": _PATH_RULES})

    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: Annotated[str, Field(max_length=1024)] = "/"

    @model_validator(mode="after")
    def _plain_path(self) -> "HTTPPathMatch":
        if self.type == "RegularExpression":
            return self
        if not self.value.startswith("/"):
            raise ValueError("an exact path or a prefix must begin with /")
        for part in _PATH_FORBIDDEN:
            if part in self.value:
                raise ValueError(f"an exact path or a prefix holds no {part}")
        if self.value.endswith(_PATH_FORBIDDEN_ENDS):
            raise ValueError("an exact path or a prefix ends not in /. or /..")
        if not re.fullmatch(_PATH_CHARS, self.value):
            raise ValueError("an exact path or a prefix holds only the characters of a URL path")
        return self


class HTTPHeaderMatch(Model):
    name: HeaderName
    type: MatchType = "Exact"
    value: Annotated[str, Field(min_length=1, max_length=4096)]


class HTTPQueryParamMatch(Model):
    name: HeaderName
    type: MatchType = "Exact"
    value: Annotated[str, Field(min_length=1, max_length=1024)]


class HTTPRouteMatch(Model):
    path: HTTPPathMatch = Field(
        default_factory=HTTPPathMatch, json_schema_extra={"default": {"type": "PathPrefix", "value": "/"}}
    )
    headers: Annotated[list[HTTPHeaderMatch], Field(max_length=16, json_schema_extra=_BY_NAME)] = []
    query_params: Annotated[list[HTTPQueryParamMatch], Field(max_length=16, json_schema_extra=_BY_NAME)] = []
    method: Literal["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"] | None = None


HTTPRouteFilter: TypeAlias = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {
                    "type": "string",
                    "enum": [
                        "RequestHeaderModifier",
                        "ResponseHeaderModifier",
                        "RequestMirror",
                        "RequestRedirect",
                        "URLRewrite",
                        "ExtensionRef",
                    ],
                }
            },
            "x-kubernetes-preserve-unknown-fields": True,
        }
    ),
]

_SERVICE_PORT = "a reference to a Service must name its port"


class HTTPBackendRef(Model):
    """One backend: a Service, or an object of another API such as Envoy Gateway's Backend."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("!(size(self.group) == 0 && self.kind == 'Service') || has(self.port)", _SERVICE_PORT)
            ]
        }
    )

    group: Group = Field(default="", json_schema_extra=SERVED)
    kind: Kind = "Service"
    name: ObjectName
    namespace: Namespace | None = None
    port: Port | None = None
    weight: Annotated[Int32, Field(ge=0, le=1_000_000)] = 1
    filters: Annotated[list[HTTPRouteFilter], Field(max_length=16)] = []

    @model_validator(mode="after")
    def _service_port(self) -> "HTTPBackendRef":
        if not self.group and self.kind == "Service" and self.port is None:
            raise ValueError(_SERVICE_PORT)
        return self
