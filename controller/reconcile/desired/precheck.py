"""What the schema admits and a pod would choke on: found before anything is made."""

from __future__ import annotations

import re

from apis.resources import ArksModel
from apis.resources.instance import RESERVED_MOUNT_PATH, RESERVED_VOLUME, ArksInstanceSpec
from controller.engines.model import Problem
from controller.reconcile.desired.metadata import LABEL_MAX

_LABEL_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_LABEL_1123 = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
# What "<app>-0-inference", "<app>-0-scheduler", "<app>-scheduler" leave of 52 characters, and "arks-application-<app>"
# of 63: (whole, disaggregated).
_ROOM = {"rbg": (40, 40), "lws": (46, 42), "deployment": (46, 42)}


def instance_problems(instance: ArksInstanceSpec | None, path: str) -> tuple[Problem, ...]:
    """Reserved names, in any spelling of the same path; volume and mount names must be unique."""
    if instance is None:
        return ()
    problems: list[Problem] = []
    volumes = [volume.name for volume in instance.volumes or ()]
    if RESERVED_VOLUME in volumes:
        text = f"the volume name {RESERVED_VOLUME!r} is reserved for the model's weights"
        problems.append(Problem("ReservedVolumeName", f"{path}.volumes", text))
    mounts = [_normal(mount.mount_path) for mount in instance.volume_mounts or ()]
    if RESERVED_MOUNT_PATH in mounts:
        text = f"the mount path {RESERVED_MOUNT_PATH} is reserved for the model's weights"
        problems.append(Problem("ReservedVolumeMountPath", f"{path}.volumeMounts", text))
    for field, names in (("volumes", volumes), ("volumeMounts", mounts)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            text = f"{', '.join(twice)} is given more than once"
            problems.append(Problem("InvalidVolumeDefinitions", f"{path}.{field}", text))
    return tuple(problems)


def _normal(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def name_problems(name: str, workload: str, *, disaggregated: bool = False) -> tuple[Problem, ...]:
    """A StatefulSet's name and a hash make one label of 63 characters; ours is the beginning of the name."""
    if workload not in _ROOM:
        return ()
    if not (_LABEL_1123 if workload == "deployment" else _LABEL_1035).match(name):
        first = "" if workload == "deployment" else "start with a letter and "
        text = f"the name must {first}hold only a-z, 0-9 and -: it becomes part of DNS names"
        return (Problem("InvalidName", "metadata.name", text),)
    limit = _ROOM[workload][disaggregated]
    if len(name) > limit:
        text = f"the name has {len(name)} characters; its Service and pods are named after it, so at most {limit} fit"
        return (Problem("InvalidName", "metadata.name", text),)
    return ()


def label_problems(name: str) -> tuple[Problem, ...]:
    """A model's name is a label of its claim, and of everything that runs it."""
    if len(name) <= LABEL_MAX:
        return ()
    text = f"the name has {len(name)} characters; it becomes a label, so at most {LABEL_MAX} fit"
    return (Problem("InvalidName", "metadata.name", text),)


def model_problems(model: ArksModel | None, name: str) -> tuple[Problem, ...]:
    """The weights must be there before a pod mounts them, also when a running application changes its model."""
    if model is None:
        return (Problem("ModelNotExist", "spec.model.name", f"there is no ArksModel {name!r} in this namespace"),)
    if model.status.phase == "Failed" and not _outdated(model):
        said = {c.type: c.message for c in model.status.conditions if c.status == "False"}
        why = said.get("Ready") or said.get("ModelLoaded") or ""
        return (
            Problem("ModelLoadFailed", "spec.model.name", f"ArksModel {name!r} failed to load: {why}".rstrip(": ")),
        )
    if model.status.phase != "Ready" or _outdated(model):
        return (Problem("ModelLoading", "spec.model.name", f"ArksModel {name!r} is not ready yet"),)
    return ()


def _outdated(model: ArksModel) -> bool:
    """The status tells of an earlier spec, whose weights may lie elsewhere. Arks' operator left no generation there."""
    seen = model.status.observed_generation
    return seen is not None and seen < model.metadata.generation
