"""Where an ArksModel's weights are, for those who fill them in and for those who read them."""

from __future__ import annotations

from dataclasses import dataclass

from apis.resources import ArksModel
from controller.engines.model import MODELS_MOUNT, Problem
from controller.workloads.model import Object

MODELS_VOLUME = "models"


@dataclass(frozen=True, slots=True)
class Storage:
    """``source`` is the volume's source as in a pod's spec; ``path`` is below ``mount`` in every container."""

    source: Object
    path: str
    # The claim that we create; None where the storage is somebody else's.
    claim: str | None = None

    def volume(self, name: str = MODELS_VOLUME) -> Object:
        return {"name": name, **self.source}


def _joined(mount: str, folder: str) -> str:
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    return "/".join([mount, *parts])


def _escapes(folder: str) -> bool:
    return ".." in folder.split("/")


def storage_of(
    model: ArksModel, *, mount: str = MODELS_MOUNT, read_only: bool = True
) -> tuple[Storage | None, Problem | None]:
    """The storage, or what is wrong with it. A claim without a name has its model's, everywhere."""
    source, storage = model.spec.source, model.spec.storage
    if source is not None and source.pvc is not None:
        if _escapes(source.pvc.sub_path):
            return None, _bad_path("spec.source.pvc.subPath")
        claim = _claim(source.pvc.claim_name)
        return Storage(claim, _joined(mount, source.pvc.sub_path)), None
    if source is not None and source.host_path is not None:
        return Storage({"hostPath": {"path": source.host_path.path, "type": "Directory"}}, mount), None
    if storage is None or (storage.pvc is None and storage.host_path is None):
        text = "no storage is named; set spec.storage.pvc, spec.storage.hostPath or a source that is storage itself"
        return None, Problem("CreateFailed", "spec.storage", text)
    if _escapes(storage.sub_path):
        return None, _bad_path("spec.storage.subPath")
    folder = storage.sub_path or f"models/{model.metadata.namespace}/{model.metadata.name}"
    if storage.host_path is not None:
        kind = "Directory" if read_only else "DirectoryOrCreate"
        return Storage({"hostPath": {"path": storage.host_path.path, "type": kind}}, _joined(mount, folder)), None
    name = (storage.pvc.name if storage.pvc else "") or model.metadata.name
    return Storage(_claim(name), _joined(mount, folder), claim=name), None


def _claim(name: str) -> Object:
    # The mount is read-only, not the claim: a read-only claim could not be shared with the loader on one node.
    return {"persistentVolumeClaim": {"claimName": name}}


def _bad_path(field: str) -> Problem:
    return Problem("InvalidPath", field, "the path must not leave its volume through ..")
