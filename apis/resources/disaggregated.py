"""ArksDisaggregatedApplication: prefill and decode on pods of their own, behind a router."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from apis.resources.base import Int32, LocalObjectReference, Model, Resource, cel
from apis.resources.instance import ArksInstanceSpec
from apis.resources.workload import PodGroupPolicy, ReplicaStatus, RollingUpdate, WorkloadStatus

_ONE_PORT = "port and int32 both name the router's port and must agree"


class RouterSpec(Model):
    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("!has(self.port) || !has(self.int32) || self.port == self.int32", _ONE_PORT)
            ]
        }
    )

    replicas: Int32 | None = None
    command_override: list[str] = []
    port: Int32 | None = None
    """8080 where neither this nor int32 is set"""
    int32: Int32 | None = None
    """the same under the name that Arks gave it"""
    metric_port: Int32 | None = None
    router_args: list[str] = []
    instance_spec: ArksInstanceSpec | None = None

    @model_validator(mode="after")
    def _one_port(self) -> "RouterSpec":
        if self.port is not None and self.int32 is not None and self.port != self.int32:
            raise ValueError(_ONE_PORT)
        return self


class DisaggregatedRole(Model):
    replicas: Int32 | None = None
    size: int = 0
    """pods that serve together as one replica; less than 1 counts as 1"""
    leader_command_override: list[str] = []
    worker_command_override: list[str] = []
    runtime_common_args: list[str] = []
    instance_spec: ArksInstanceSpec | None = None
    rolling_update: RollingUpdate | None = None


class ArksDisaggregatedApplicationSpec(Model):
    runtime: str = ""
    """sglang (also when empty), vllm or dynamo"""
    router_image: str = ""
    runtime_image: str = ""
    runtime_image_pull_secrets: list[LocalObjectReference] = []
    model: LocalObjectReference
    served_model_name: str = ""
    router: RouterSpec
    prefill: DisaggregatedRole
    decode: DisaggregatedRole
    pod_group_policy: PodGroupPolicy | None = None


class ArksDisaggregatedApplicationStatus(WorkloadStatus):
    router: ReplicaStatus | None = None
    prefill: ReplicaStatus | None = None
    decode: ReplicaStatus | None = None


class ArksDisaggregatedApplication(Resource):
    kind: Literal["ArksDisaggregatedApplication"] = "ArksDisaggregatedApplication"
    spec: ArksDisaggregatedApplicationSpec
    status: ArksDisaggregatedApplicationStatus = Field(default_factory=ArksDisaggregatedApplicationStatus)
