"""ArksEndpoint: one public model of one namespace, and what stands behind it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from apis.resources.base import Int32, Model, Resource, Status
from apis.resources.gatewayapi import HTTPBackendRef, HTTPRouteMatch, ParentReference

_EVERYTHING: dict[str, Any] = {"default": [{"path": {"type": "PathPrefix", "value": "/"}}]}


class ArksEndpointSpec(Model):
    default_weight: Annotated[Int32, Field(ge=0)] = 1
    """weight of each application found by its served model name"""
    gateway_ref: ParentReference
    match_configs: Annotated[list[HTTPRouteMatch], Field(max_length=16)] = Field(
        default_factory=lambda: [HTTPRouteMatch()], json_schema_extra=_EVERYTHING
    )
    route_configs: Annotated[list[HTTPBackendRef], Field(max_length=16)] = []
    """backends beside the applications that are found by themselves"""

    model_name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[^\x00-\x20\x7f]+$")] | None = None
    """the model name that clients send, where it cannot be this object's name"""
    allowed_engine_fields: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []
    """body fields that steer the engine's inside and that clients may send here, such as priority or bootstrap_*"""
    cache_salt_per_tenant: bool = False
    """give every tenant a prefix cache of its own, so that none can time another's prompts"""
    max_output_tokens: Annotated[Int32, Field(ge=1)] = 4096
    """the engine's own bound on one answer: reserved where the client sets none, or a larger one"""
    media_tokens: Annotated[Int32, Field(ge=0)] = 2048
    """reserved for each image, audio or video part"""
    weight_policy: Literal["static", "capacity", "load"] = "static"
    """static: weights as written; capacity: times ready replicas; load: following the engines' load"""

    @model_validator(mode="after")
    def _distinct_fields(self) -> "ArksEndpointSpec":
        if len(set(self.allowed_engine_fields)) != len(self.allowed_engine_fields):
            raise ValueError("allowedEngineFields names a field twice")
        return self


class ArksEndpointStatus(Status):
    routes: Annotated[list[HTTPBackendRef], Field(max_length=16)] = []


class ArksEndpoint(Resource):
    kind: Literal["ArksEndpoint"] = "ArksEndpoint"
    spec: ArksEndpointSpec
    status: ArksEndpointStatus = Field(default_factory=ArksEndpointStatus)
