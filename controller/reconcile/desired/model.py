"""ArksModel: its claim, and the Job that fills it.

The Job keeps the name that Arks gave its download pod. A Job's template cannot be changed, so its annotation
tells which request it was made for; when that differs, the Job is deleted and made anew. The loader is told what
to do by one JSON argument, and gets secrets as environment variables or files, never in its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from apis.resources import ArksModel
from apis.resources.model import Download, OciSource, Proxy
from controller.engines.images import loader_image
from controller.engines.model import MODELS_MOUNT, Problem
from controller.reconcile.desired.metadata import LABEL_MAX, MANAGED_BY, object_metadata, plain
from controller.reconcile.desired.pod import instance_dict, merged_env, pod_level, pull_secrets
from controller.reconcile.desired.precheck import instance_problems, label_problems
from controller.reconcile.desired.storage import MODELS_VOLUME, Storage, storage_of
from controller.workloads.model import MODEL_LABEL, TEMPLATE_HASH, Deletion, Object, template_hash

LOADER_COMMAND = ("python3", "-m", "controller.models")
OCI_SECRET_MOUNT = "/run/secrets/arks-oci"  # noqa: S105 - a directory
_DOWNLOADED = ("huggingface", "modelscope", "s3", "oci")
# What of a source decides which files there are.
_CONTENT = ("model", "revision", "include", "exclude", "bucket", "prefix", "endpoint", "reference")
_TOKENS = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_S3_SESSION = "AWS_SESSION_TOKEN"  # temporary credentials have it, others do not
_OCI_KEY = ".dockerconfigjson"


@dataclass(frozen=True, slots=True)
class DesiredModel:
    """``claim`` is None where the storage is not a claim of ours or exists already under somebody else; ``job`` is
    None where nothing is to be downloaded. ``delete`` holds a Job of an older request.
    """

    claim: Object | None = None
    job: Object | None = None
    storage: Storage | None = None
    delete: tuple[Deletion, ...] = ()
    problems: tuple[Problem, ...] = ()


def source_kind(model: ArksModel) -> str:
    """Which source is set; empty when the weights are in the storage already (no source, or an empty one)."""
    source = model.spec.source
    if source is None:
        return ""
    return next((kind for kind, value in plain(source).items() if value is not None), "")


def desired_model(
    model: ArksModel,
    *,
    environment: Mapping[str, str],
    claim_exists: bool = False,
    job: Object | None = None,
    node: str = "",
) -> DesiredModel:
    """``claim_exists``: a claim of that name is there (ours or not; a claim's spec cannot change, so it is left).
    ``node``: copy onto that node (``storage.hostPath``), in a Job of its own.
    """
    storage, problem = storage_of(model, read_only=False)
    problems = (*instance_problems(model.spec.instance_spec, "spec.instanceSpec"), *label_problems(model.metadata.name))
    if storage is None or problems:
        return DesiredModel(problems=(*((problem,) if problem else ()), *problems))
    claim = None
    pvc = model.spec.storage.pvc if model.spec.storage else None
    if storage.claim is not None and pvc is not None and not claim_exists:
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": object_metadata(model, storage.claim, _labels(model)),
            "spec": plain(pvc.spec),
        }
    if source_kind(model) not in _DOWNLOADED:
        return DesiredModel(claim, None, storage)
    wanted = _job(model, storage, environment, node)
    mark = wanted["metadata"]["annotations"][TEMPLATE_HASH]
    if job is not None and (job["metadata"].get("annotations") or {}).get(TEMPLATE_HASH) != mark:
        stale = Deletion("batch/v1", "Job", model.metadata.namespace, job["metadata"]["name"])
        return DesiredModel(claim, None, storage, (stale,))
    return DesiredModel(claim, wanted, storage)


def job_name(model: ArksModel, node: str = "") -> str:
    """Arks' name, as far as it goes: a Job's name is a label of its pods, too."""
    name = f"arks-worker-{model.metadata.name}"
    whole = f"{name}-{template_hash(node)[:8]}" if node else name
    if len(whole) <= LABEL_MAX:
        return whole
    return f"{name[: LABEL_MAX - 9].rstrip('-.')}-{template_hash([name, node])[:8]}"


def load_request(model: ArksModel, storage: Storage) -> Object:
    """What the loader shall do; no secret in it."""
    kind = source_kind(model)
    source = plain(model.spec.source)[kind]
    told = {key: value for key, value in source.items() if not key.endswith("SecretRef") and key != "proxy"}
    return {"model": model.spec.model, "path": storage.path, "source": {"kind": kind, **told}}


def weights_mark(model: ArksModel) -> str:
    """Another where other files are asked for, not where they come from otherwise; empty where nothing is loaded."""
    kind = source_kind(model)
    if kind not in _DOWNLOADED:
        return ""
    source = plain(model.spec.source)[kind]
    if kind in _TOKENS:
        source = {**source, "model": model.spec.model, "endpoint": None}  # a hub's mirror has the same files
    return template_hash([kind, *(source.get(key) for key in _CONTENT)])


def _labels(model: ArksModel) -> dict[str, str]:
    return {MODEL_LABEL: model.metadata.name, **MANAGED_BY}


def _job(model: ArksModel, storage: Storage, environment: Mapping[str, str], node: str) -> Object:
    template = _template(model, storage, environment, node)
    meta = object_metadata(model, job_name(model, node), _labels(model))
    meta["annotations"] = {TEMPLATE_HASH: template_hash(template)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        # The loader resumes where it stopped, so a few restarts are cheap; it tells a lasting cause by exit code 3.
        "spec": {
            "backoffLimit": 6,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "worker", "operator": "In", "values": [3]},
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": template,
        },
    }


def _template(model: ArksModel, storage: Storage, environment: Mapping[str, str], node: str) -> Object:
    instance = instance_dict(model.spec.instance_spec)
    kind = source_kind(model)
    secret_env, secret_volumes, secret_mounts = _secrets(model, kind)
    container: Object = {
        "name": "worker",
        "image": loader_image(environment),
        "imagePullPolicy": "IfNotPresent",
        "command": [*LOADER_COMMAND],
        "args": [json.dumps(load_request(model, storage), sort_keys=True, separators=(",", ":"))],
        "env": merged_env(
            (
                {"name": "MODEL_NAME", "value": model.spec.model},
                {"name": "MODEL_PATH", "value": storage.path},
                *_proxy_env(model, kind),
                *secret_env,
            ),
            instance.get("env", []),
        ),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": MODELS_VOLUME, "mountPath": MODELS_MOUNT},
            *secret_mounts,
            *instance.get("volumeMounts", []),
        ],
    }
    for key in ("resources", "securityContext", "lifecycle", "livenessProbe", "readinessProbe", "startupProbe"):
        if key in instance:
            container[key] = instance[key]
    spec: Object = {
        **pod_level(instance),
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [storage.volume(), *secret_volumes, *instance.get("volumes", [])],
    }
    if instance.get("initContainers"):
        spec["initContainers"] = instance["initContainers"]
    if "terminationGracePeriodSeconds" in instance:
        spec["terminationGracePeriodSeconds"] = instance["terminationGracePeriodSeconds"]
    if model.spec.image_pull_secrets:
        spec["imagePullSecrets"] = pull_secrets(model.spec.image_pull_secrets)
    if node:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), "kubernetes.io/hostname": node}
        tolerations = plain(model.spec.preload).get("tolerations", []) if model.spec.preload else []
        spec["tolerations"] = [*spec.get("tolerations", []), *tolerations]
    metadata: Object = {"labels": {**instance.get("labels", {}), **_labels(model)}}
    if instance.get("annotations"):
        metadata["annotations"] = instance["annotations"]
    return {"metadata": metadata, "spec": spec}


def _secrets(model: ArksModel, kind: str) -> tuple[list[Object], list[Object], list[Object]]:
    """(environment, volumes, mounts) that carry the source's credentials into the loader."""
    source = model.spec.source
    assert source is not None
    if kind in _TOKENS:
        hub = source.huggingface if kind == "huggingface" else source.modelscope
        reference = hub.token_secret_ref if hub else None
        return ([_secret_env(_TOKENS[kind], reference.name)] if reference else []), [], []
    if kind == "s3" and source.s3 is not None and source.s3.credentials_secret_ref is not None:
        name = source.s3.credentials_secret_ref.name
        given = [_secret_env(key, name) for key in _S3_KEYS]
        return [*given, _secret_env(_S3_SESSION, name, optional=True)], [], []
    if kind == "oci" and source.oci is not None and source.oci.pull_secret_ref is not None:
        items = [{"key": _OCI_KEY, "path": "config.json"}]
        volume = {"name": "arks-oci", "secret": {"secretName": source.oci.pull_secret_ref.name, "items": items}}
        mount = {"name": "arks-oci", "mountPath": OCI_SECRET_MOUNT, "readOnly": True}
        return [{"name": "DOCKER_CONFIG", "value": OCI_SECRET_MOUNT}], [volume], [mount]
    return [], [], []


def secret_keys(model: ArksModel) -> tuple[str, ...]:
    """Keys that the source's Secret must have, if it names one: a pod that lacks one of them never starts."""
    kind = source_kind(model)
    return {"s3": _S3_KEYS, "oci": (_OCI_KEY,)}.get(kind) or ((_TOKENS[kind],) if kind in _TOKENS else ())


def _secret_env(key: str, secret: str, *, optional: bool = False) -> Object:
    reference: Object = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}


def _proxy_env(model: ArksModel, kind: str) -> list[Object]:
    source = getattr(model.spec.source, kind)
    proxy: Proxy | None = source.proxy if isinstance(source, Download | OciSource) else None
    if proxy is None:
        return []
    said = {"HTTP_PROXY": proxy.http_proxy, "HTTPS_PROXY": proxy.https_proxy, "NO_PROXY": proxy.no_proxy}
    return [{"name": name, "value": value} for name, value in said.items() if value]
