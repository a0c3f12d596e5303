"""ArksQuota: a budget of tokens for the quota's whole life, shared by the tokens that name it."""

from typing import Annotated, Literal

from pydantic import Field

from apis.resources.base import Count, Int64, Model, Resource, Status, Time


class Quota(Model):
    type: Literal["prompt", "response", "total"]
    value: Count


class ArksQuotaSpec(Model):
    quotas: Annotated[list[Quota], Field(min_length=1)]


class QuotaUsage(Model):
    type: str
    used: Int64
    last_update_time: Time | None = None


class ArksQuotaStatus(Status):
    quota_status: list[QuotaUsage] = []


class ArksQuota(Resource):
    kind: Literal["ArksQuota"] = "ArksQuota"
    spec: ArksQuotaSpec
    status: ArksQuotaStatus = Field(default_factory=ArksQuotaStatus)
