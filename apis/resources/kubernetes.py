"""Foreign kinds, as far as they tell which addresses stand behind a route, or which secret behind a token.

Secret and Service and EndpointSlice are Kubernetes' own; Backend is Envoy Gateway's (gateway.envoyproxy.io/v1alpha1).
Only the fields that are read are typed.
"""

import base64
import binascii
import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from apis.resources.base import DNS_SUBDOMAIN, Foreign, Model, Port


def _base64(value: str) -> str:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64; put plain text under stringData") from None
    return value


def _ip(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("is no IP address; use fqdn for a name") from None


class Secret(Foreign):
    api_version: Literal["v1"]
    kind: Literal["Secret"] = "Secret"
    type: str = "Opaque"
    immutable: bool = False
    data: dict[str, Annotated[str, AfterValidator(_base64)]] = Field(default={}, repr=False)
    string_data: dict[str, str] = Field(default={}, repr=False)

    def value(self, key: str) -> bytes | None:
        """The bytes under a key; `stringData` wins over `data`, as on an API server."""
        if key in self.string_data:
            return self.string_data[key].encode()
        return base64.b64decode(self.data[key]) if key in self.data else None


class IPEndpoint(Model):
    address: Annotated[str, AfterValidator(_ip)]
    port: Port


class FQDNEndpoint(Model):
    hostname: Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
    port: Port


class BackendEndpoint(Model):
    ip: IPEndpoint | None = None
    fqdn: FQDNEndpoint | None = None
    zone: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> "BackendEndpoint":
        if (self.ip is None) == (self.fqdn is None):
            raise ValueError("exactly one of ip and fqdn must be set (unix sockets are not supported)")
        return self


class BackendSpec(Model):
    endpoints: Annotated[list[BackendEndpoint], Field(min_length=1, max_length=64)]
    app_protocols: list[str] = []
    fallback: bool = False
    type: Literal["Endpoints"] = "Endpoints"


class Backend(Foreign):
    api_version: Literal["gateway.envoyproxy.io/v1alpha1"]
    kind: Literal["Backend"] = "Backend"
    spec: BackendSpec


class ServicePort(Model):
    name: str = ""
    port: Port


class ServiceSpec(Model):
    type: str = "ClusterIP"
    external_name: str = ""
    ports: list[ServicePort] = []


class Service(Foreign):
    api_version: Literal["v1"]
    kind: Literal["Service"] = "Service"
    spec: ServiceSpec


class SliceConditions(Model):
    ready: bool = True


class SliceEndpoint(Model):
    addresses: list[str]
    conditions: SliceConditions = Field(default_factory=SliceConditions)


class SlicePort(Model):
    name: str = ""
    port: Port | None = None


class EndpointSlice(Foreign):
    api_version: Literal["discovery.k8s.io/v1"]
    kind: Literal["EndpointSlice"] = "EndpointSlice"
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[SliceEndpoint] = []
    ports: list[SlicePort] = []

    @model_validator(mode="after")
    def _addresses_as_envoy_writes_them(self) -> "EndpointSlice":
        if self.address_type != "FQDN":
            for endpoint in self.endpoints:
                endpoint.addresses = [_ip(address) for address in endpoint.addresses]
        return self

    @property
    def service(self) -> str:
        """The Service this slice belongs to; empty when it belongs to none."""
        return self.metadata.labels.get("kubernetes.io/service-name", "")


FOREIGN_KINDS: dict[tuple[str, str], type[Foreign]] = {
    ("v1", "Secret"): Secret,
    ("v1", "Service"): Service,
    ("discovery.k8s.io/v1", "EndpointSlice"): EndpointSlice,
    ("gateway.envoyproxy.io/v1alpha1", "Backend"): Backend,
}
