"""The weights that an application's pods mount: its model's, and those of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from apis.resources import ArksApplication, ArksModel
from controller.engines.model import MODELS_MOUNT, LoraAdapter, Problem
from controller.reconcile.desired.model import weights_mark
from controller.reconcile.desired.precheck import model_problems
from controller.reconcile.desired.storage import MODELS_VOLUME, storage_of
from controller.workloads.model import Object, template_hash

WEIGHTS_ANNOTATION = "arks.ai/weights"


@dataclass(frozen=True, slots=True)
class Weights:
    """Volumes and mounts of the base model and its adapters. ``annotations`` mark the pods that hold these weights in
    memory: a model that is changed in place is loaded to the same path, and they must be replaced.
    """

    path: str = ""
    volumes: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()
    adapters: tuple[LoraAdapter, ...] = ()
    problems: tuple[Problem, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


def mounted_model(model: ArksModel) -> Weights:
    storage, problem = storage_of(model)
    if storage is None:
        return Weights(problems=(problem,) if problem else ())
    mount = {"name": MODELS_VOLUME, "mountPath": MODELS_MOUNT, "readOnly": True}
    return Weights(storage.path, (storage.volume(),), (mount,), annotations=_marked(weights_mark(model)))


def mounted_weights(app: ArksApplication, model: ArksModel, known: Mapping[str, ArksModel]) -> Weights:
    base = mounted_model(model)
    if base.problems:
        return base
    volumes, mounts, adapters = list(base.volumes), list(base.mounts), []
    problems: list[Problem] = []
    for index, wanted in enumerate(app.spec.lora_adapters):
        path = f"spec.loraAdapters[{index}].model.name"
        found = known.get(wanted.model.name)
        state = model_problems(found, wanted.model.name)
        if state or found is None:
            problems += [Problem(item.reason, path, item.message) for item in state]
            continue
        mount = f"/adapters/{index}"
        storage, problem = storage_of(found, mount=mount)
        if storage is None:
            problems += [problem] if problem else []
            continue
        same = storage.source == {key: value for key, value in volumes[0].items() if key != "name"}
        name = MODELS_VOLUME if same else f"adapter-{index}"
        if not same:
            volumes.append(storage.volume(name))
        mounts.append({"name": name, "mountPath": mount, "readOnly": True})
        adapters.append(LoraAdapter(wanted.name, storage.path))
    marks = [weights_mark(known[item.model.name]) for item in app.spec.lora_adapters if item.model.name in known]
    annotations = base.annotations
    if any(marks):
        annotations = _marked(template_hash([weights_mark(model), *marks]))
    return Weights(base.path, tuple(volumes), tuple(mounts), tuple(adapters), tuple(problems), annotations)


def _marked(mark: str) -> dict[str, str]:
    return {WEIGHTS_ANNOTATION: mark} if mark else {}
