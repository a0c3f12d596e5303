"""ArksToken: who may use which models, how much."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from apis.resources.base import (
    Count,
    Int32,
    LocalObjectReference,
    Model,
    Resource,
    SecretKeyReference,
    Status,
    Time,
    cel,
)

_ONE_SECRET = "exactly one of token, tokenHash and tokenSecretRef must be set"  # noqa: S105 - a message


class RateLimit(Model):
    type: Literal["rpm", "rpd", "tpm", "tpd"]
    """requests or tokens, per UTC-aligned minute or day"""
    value: Count


class TokenQos(Model):
    """One model this token may use, and its limits there."""

    arks_endpoint: LocalObjectReference
    """the ArksEndpoint, in the token's namespace"""
    rate_limits: list[RateLimit] = []
    quota: LocalObjectReference | None = None
    """an ArksQuota, in the token's namespace; shared by every token that names it"""


class ArksTokenSpec(Model):
    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "[has(self.token), has(self.tokenHash), has(self.tokenSecretRef)].filter(set, set).size() == 1",
                    _ONE_SECRET,
                )
            ]
        }
    )

    token: Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = Field(default=None, repr=False)
    """the secret in plain text; tokenHash or tokenSecretRef keep it out of this object"""
    token_hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = Field(default=None, repr=False)
    """sha256: and the lower-case hexadecimal SHA-256 of the secret"""
    token_secret_ref: SecretKeyReference | None = None
    """a Secret in the token's namespace, and the key that holds the secret"""
    qos: list[TokenQos]
    expires_at: Time | None = None
    """from this time on the token is refused"""
    disabled: bool = False
    """refuse the token without deleting it"""
    max_concurrent_requests: Annotated[Int32, Field(ge=1)] | None = None
    """requests of this token in flight at once, over all its models"""
    priority: Annotated[Int32, Field(ge=-1000, le=1000)] = 0
    """higher goes first where requests wait for a slot"""

    @model_validator(mode="after")
    def _one_secret(self) -> "ArksTokenSpec":
        if sum(secret is not None for secret in (self.token, self.token_hash, self.token_secret_ref)) != 1:
            raise ValueError(_ONE_SECRET)
        return self


class ArksToken(Resource):
    kind: Literal["ArksToken"] = "ArksToken"
    spec: ArksTokenSpec
    status: Status = Field(default_factory=Status)
