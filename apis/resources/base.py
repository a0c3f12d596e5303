"""What every `arks.ai/v1` kind shares: metadata, references, conditions, and how a cross-field rule is written.

The models are read by three parties: the folder source and the controller validate with them, `apis.crds` turns them
into CustomResourceDefinitions. Unknown fields are ignored, as an API server prunes them; who wants to hear of typing
errors validates a token, quota or endpoint with `extra="forbid"`. Types are strict: `"5"` is no number, as on an API
server. Errors never carry the input, which may be a secret.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP = "arks.ai"
VERSION = "v1"
API_VERSION = f"{GROUP}/{VERSION}"

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"

Int32: TypeAlias = Annotated[int, Field(ge=INT32[0], le=INT32[1], json_schema_extra={"format": "int32"})]
Int64: TypeAlias = Annotated[int, Field(ge=INT64[0], le=INT64[1], json_schema_extra={"format": "int64"})]
Count: TypeAlias = Annotated[int, Field(ge=0, le=INT64[1], json_schema_extra={"format": "int64"})]
Port: TypeAlias = Annotated[int, Field(ge=1, le=65535, json_schema_extra={"format": "int32"})]

QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
Quantity: TypeAlias = Annotated[
    int | Annotated[str, Field(pattern=QUANTITY)],
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": QUANTITY,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
IntOrString: TypeAlias = Annotated[
    int | str,
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}),
]

Loose: TypeAlias = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
]
"""A Kubernetes core type that the API server checks when the pod is made; here it only passes through."""


def _rfc3339(value: object) -> object:
    """Strict mode takes no strings for datetimes; an API server knows nothing else."""
    if isinstance(value, str):
        if len(value) < 20 or value[10] not in "Tt":
            raise ValueError("must be an RFC 3339 time with a zone, such as 2027-01-31T00:00:00Z")
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("must be an RFC 3339 time with a zone, such as 2027-01-31T00:00:00Z") from None
    return value


def _zoned(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("must name its time zone, such as 2027-01-31T00:00:00Z")
    return value


Time: TypeAlias = Annotated[
    datetime,
    BeforeValidator(_rfc3339),
    AfterValidator(_zoned),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


SERVED: dict[str, Any] = {"x-arks-served-default": True}
"""Marks a field whose empty default the API server is to write down: rules read the field, or Arks always had it."""


def cel(rule: str, message: str) -> dict[str, Any]:
    """One cross-field rule as the API server evaluates it; the model's validator says the same in Python."""
    return {"message": message, "rule": rule}


class Model(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        strict=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


class ObjectMeta(Model):
    name: Annotated[str, Field(pattern=DNS_SUBDOMAIN, max_length=253)]
    namespace: Annotated[str, Field(pattern=DNS_LABEL, max_length=63)] = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None
    finalizers: list[str] = []
    owner_references: list[dict[str, Any]] = []


class LocalObjectReference(Model):
    """The name of an object in the same namespace."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-map-type": "atomic"})

    name: str = Field(default="", json_schema_extra=SERVED)


class SecretKeyReference(Model):
    """One key of a Secret in the same namespace."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-map-type": "atomic"})

    name: Annotated[str, Field(min_length=1, max_length=253)]
    key: Annotated[str, Field(min_length=1, max_length=253)]


class Condition(Model):
    type: str
    status: str
    """True, False or Unknown"""
    last_transition_time: Time | None = None
    reason: str | None = None
    message: str | None = None
    observed_generation: Int64 | None = None


Conditions: TypeAlias = Annotated[
    list[Condition],
    Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
]


class Status(Model):
    observed_generation: Int64 | None = None
    """the spec's generation that this status speaks of"""
    conditions: Conditions = []


class Resource(Model):
    """An object of group arks.ai. Subclasses fix `kind`, `spec` and `status`."""

    api_version: Literal["arks.ai/v1"] = "arks.ai/v1"
    metadata: ObjectMeta

    @property
    def key(self) -> tuple[str, str]:
        return (self.metadata.namespace, self.metadata.name)


class Foreign(Model):
    """An object of somebody else's API."""

    api_version: str
    metadata: ObjectMeta

    @property
    def key(self) -> tuple[str, str]:
        return (self.metadata.namespace, self.metadata.name)
