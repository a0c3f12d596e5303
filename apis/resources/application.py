"""ArksApplication: one engine, in as many replicas as wanted, each of one or more pods."""

from typing import Annotated, Literal

from pydantic import Field

from apis.resources.base import Int32, LocalObjectReference, Model, Resource
from apis.resources.instance import ArksInstanceSpec
from apis.resources.workload import LoraAdapter, PodGroupPolicy, RollingUpdate, WorkloadStatus


class ArksApplicationSpec(Model):
    replicas: int = 0
    size: int = 0
    """pods that serve together as one replica; less than 1 counts as 1"""
    runtime: str = ""
    """vllm (also when empty), sglang or dynamo"""
    runtime_image: str = ""
    runtime_image_pull_secrets: list[LocalObjectReference] = []
    model: LocalObjectReference
    served_model_name: str = ""
    """the name that an ArksEndpoint finds this application by; the model's where empty"""
    tensor_parallel_size: int = 0
    runtime_common_args: list[str] = []
    """appended to the engine's command line; wins over what Arks sets"""
    instance_spec: ArksInstanceSpec
    pod_group_policy: PodGroupPolicy | None = None

    pipeline_parallel_size: Annotated[Int32, Field(ge=0)] = 0
    lora_adapters: Annotated[
        list[LoraAdapter],
        Field(
            max_length=256,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    rolling_update: RollingUpdate | None = None


class ArksApplicationStatus(WorkloadStatus):
    replicas: Int32 = 0
    ready_replicas: Int32 = 0
    updated_replicas: Int32 = 0
    selector: str | None = None
    """label selector of the pods that serve, for the scale subresource"""


class ArksApplication(Resource):
    kind: Literal["ArksApplication"] = "ArksApplication"
    spec: ArksApplicationSpec
    status: ArksApplicationStatus = Field(default_factory=ArksApplicationStatus)
