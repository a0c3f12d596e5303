"""What both application kinds share: gang scheduling, rolling updates, adapters, and the states of a rollout."""

from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from apis.resources.base import SERVED, Int32, IntOrString, LocalObjectReference, Model, Status, cel

Phase: TypeAlias = Literal["Pending", "Checking", "Loading", "Creating", "Running", "Failed"]
ConditionType: TypeAlias = Literal["Precheck", "Loaded", "Ready"]

_ONE_SCHEDULER = "only one of kubeScheduling and volcanoScheduling may be set"


class KubeScheduling(Model):
    schedule_timeout_seconds: Int32 = 60


class VolcanoScheduling(Model):
    priority_class_name: str | None = None
    queue: str | None = None


class PodGroupPolicy(Model):
    """Start all pods of a group together or none. Empty: no gang scheduling."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("!(has(self.kubeScheduling) && has(self.volcanoScheduling))", _ONE_SCHEDULER)
            ]
        }
    )

    kube_scheduling: KubeScheduling | None = None
    volcano_scheduling: VolcanoScheduling | None = None

    @model_validator(mode="after")
    def _one_scheduler(self) -> "PodGroupPolicy":
        if self.kube_scheduling is not None and self.volcano_scheduling is not None:
            raise ValueError(_ONE_SCHEDULER)
        return self


_STUCK = "maxUnavailable and maxSurge must not both be 0: nothing could ever be replaced"


class RollingUpdate(Model):
    """How many replicas may be missing, or too many, while a change rolls out."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!((self.maxUnavailable == 0 || self.maxUnavailable == '0%')"
                    " && (self.maxSurge == 0 || self.maxSurge == '0%'))",
                    _STUCK,
                )
            ]
        }
    )

    max_unavailable: IntOrString = 1
    max_surge: IntOrString = Field(default=0, json_schema_extra=SERVED)
    partition: Annotated[Int32, Field(ge=0)] = 0
    """replicas below this ordinal stay as they are"""

    @model_validator(mode="after")
    def _moves(self) -> "RollingUpdate":
        if self.max_unavailable in {0, "0%"} and self.max_surge in {0, "0%"}:
            raise ValueError(_STUCK)
        return self


class LoraAdapter(Model):
    """An adapter served beside the base model, under a model name of its own."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    model: LocalObjectReference
    """the ArksModel that holds the adapter's weights"""


class ReplicaStatus(Model):
    replicas: Int32
    ready_replicas: Int32
    updated_replicas: Int32


class WorkloadStatus(Status):
    phase: str | None = None
    """Pending, Checking, Loading, Creating, Running or Failed"""
    driver: str | None = None
    """what runs the pods: lws, rbg or deployment"""
