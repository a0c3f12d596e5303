"""ArksModel: weights, where they come from and where they are kept."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator

from apis.resources.base import (
    Count,
    Int32,
    IntOrString,
    LocalObjectReference,
    Loose,
    Model,
    Quantity,
    Resource,
    Status,
    cel,
)
from apis.resources.instance import ArksInstanceSpec, AtomicMap, Toleration

Phase: TypeAlias = Literal["Pending", "StorageCreating", "ModelLoading", "Ready", "Failed"]
ConditionType: TypeAlias = Literal["StorageCreated", "ModelLoaded", "Ready"]

Url: TypeAlias = Annotated[str, Field(max_length=2048, pattern=r"^https?://[^\s]+$")]
Pattern: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024)]
Patterns: TypeAlias = Annotated[list[Pattern], Field(max_length=128)]
HostPath: TypeAlias = Annotated[str, Field(min_length=2, max_length=4096, pattern=r"^/[^\x00]+$")]


class Proxy(Model):
    """How the download reaches the outside."""

    http_proxy: Url | None = None
    https_proxy: Url | None = None
    no_proxy: str | None = None


class Download(Model):
    """What every source that is copied file by file can be told."""

    include: Patterns = []
    """file name patterns; all files where empty"""
    exclude: Patterns = []
    proxy: Proxy | None = None


class HubSource(Download):
    """A repository of a model hub, named by spec.model."""

    token_secret_ref: LocalObjectReference | None = None
    """a Secret with the key HF_TOKEN (Hugging Face) or MODELSCOPE_API_TOKEN (ModelScope)"""
    endpoint: Url | None = None
    """a mirror's address"""
    revision: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """branch, tag or commit; the commit it stood for is kept in the status"""


class S3Source(Download):
    """Objects under a prefix of an S3-compatible store."""

    bucket: Annotated[str, Field(min_length=3, max_length=255)]
    prefix: str = ""
    endpoint: Url | None = None
    region: str | None = None
    credentials_secret_ref: LocalObjectReference | None = None
    """a Secret: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, if temporary AWS_SESSION_TOKEN; else the pod's identity"""
    path_style: bool = False


class OciSource(Model):
    """An artifact of an OCI registry."""

    reference: Annotated[str, Field(min_length=1, max_length=1024)]
    """registry/repository:tag or registry/repository@sha256:digest"""
    pull_secret_ref: LocalObjectReference | None = None
    """a Secret of type kubernetes.io/dockerconfigjson"""
    plain_http: bool = False
    proxy: Proxy | None = None


class PvcSource(Model):
    """Weights that are already in a claim; they are served from there."""

    claim_name: Annotated[str, Field(min_length=1, max_length=253)]
    sub_path: str = ""


class HostPathSource(Model):
    """Weights that are already on every node that the engine may run on."""

    path: HostPath


_SOURCES = ("huggingface", "modelscope", "s3", "oci", "pvc", "hostPath")
_ONE_SOURCE = "at most one of " + ", ".join(_SOURCES) + " may be set"


class ModelSource(Model):
    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "[" + ", ".join(f"has(self.{name})" for name in _SOURCES) + "].filter(set, set).size() <= 1",
                    _ONE_SOURCE,
                )
            ]
        }
    )

    huggingface: HubSource | None = None
    modelscope: HubSource | None = None
    s3: S3Source | None = None
    oci: OciSource | None = None
    pvc: PvcSource | None = None
    host_path: HostPathSource | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSource":
        given = (self.huggingface, self.modelscope, self.s3, self.oci, self.pvc, self.host_path)
        if sum(source is not None for source in given) > 1:
            raise ValueError(_ONE_SOURCE)
        return self


class VolumeResources(Model):
    limits: dict[str, Quantity] | None = None
    requests: dict[str, Quantity] | None = None


class ClaimSpec(Model):
    """A PersistentVolumeClaim's spec (core/v1)."""

    access_modes: Annotated[list[str], Field(json_schema_extra={"x-kubernetes-list-type": "atomic"})] | None = None
    resources: VolumeResources | None = None
    storage_class_name: str | None = None
    volume_mode: str | None = None
    volume_name: str | None = None
    volume_attributes_class_name: str | None = None
    selector: Loose | None = None
    data_source: Loose | None = None
    data_source_ref: Loose | None = None


class PvcStorage(Model):
    name: str = ""
    """the claim; this object's name where empty. A claim that exists is used and never deleted."""
    spec: ClaimSpec


class HostPathStorage(Model):
    """A folder on each node that holds a copy of its own."""

    path: HostPath


_ONE_STORAGE = "only one of pvc and hostPath may be set"


class ModelStorage(Model):
    model_config = ConfigDict(
        json_schema_extra={"x-kubernetes-validations": [cel("!(has(self.pvc) && has(self.hostPath))", _ONE_STORAGE)]}
    )

    pvc: PvcStorage | None = None
    host_path: HostPathStorage | None = None
    sub_path: str = ""

    @model_validator(mode="after")
    def _one_storage(self) -> "ModelStorage":
        if self.pvc is not None and self.host_path is not None:
            raise ValueError(_ONE_STORAGE)
        return self


class Preload(Model):
    """Copy the weights onto nodes before an engine asks for them."""

    node_selector: AtomicMap = {}
    """all nodes where empty"""
    tolerations: list[Toleration] = []
    max_parallel: IntOrString = 2
    """nodes that copy at once"""


_PRELOAD = "preload needs storage.hostPath: a claim is not copied onto nodes"
_RULES: list[Any] = [cel("!has(self.preload) || (has(self.storage) && has(self.storage.hostPath))", _PRELOAD)]


class ArksModelSpec(Model):
    model_config = ConfigDict(json_schema_extra={"x-kubernetes-validations": _RULES})

    model: str
    """the repository's name on its hub, such as Qwen/Qwen2.5-7B-Instruct"""
    source: ModelSource | None = None
    """absent: the weights are in the storage already"""
    storage: ModelStorage | None = None
    image_pull_secrets: list[LocalObjectReference] = []
    instance_spec: ArksInstanceSpec | None = None
    preload: Preload | None = None

    @model_validator(mode="after")
    def _preload_place(self) -> "ArksModelSpec":
        if self.preload is not None and (self.storage is None or self.storage.host_path is None):
            raise ValueError(_PRELOAD)
        return self


class Progress(Model):
    """How far a download is, while there is one."""

    percent: Int32 | None = None
    """of the bytes"""
    bytes_done: Count = 0
    bytes_total: Count | None = None
    files_done: Int32 = 0
    files_total: Int32 | None = None


class ArksModelStatus(Status):
    phase: str | None = None
    """Pending, StorageCreating, ModelLoading, Ready or Failed"""
    revision: str | None = None
    """what was downloaded: the hub's commit, or the artifact's digest"""
    progress: Progress | None = None
    preloaded_nodes: Annotated[list[str], Field(json_schema_extra={"x-kubernetes-list-type": "set"})] = []


class ArksModel(Resource):
    kind: Literal["ArksModel"] = "ArksModel"
    spec: ArksModelSpec
    status: ArksModelStatus = Field(default_factory=ArksModelStatus)
