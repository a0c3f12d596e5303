"""CustomResourceDefinitions of the six kinds, made from their pydantic models.

`python -m apis.crds [FOLDER]` writes one file per kind to `manifests/crds`; a test compares them with what is there.

Names, short names and printer columns are Arks' own, in its order; ours come after them. What pydantic says of a type
is turned into a structural schema: references are written out, `X or null` is an optional X, and a default is written
only where it says more than "empty", so that the server does not fill stored objects with nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

from apis.resources import KINDS
from apis.resources.base import GROUP, INT32, INT64, VERSION

Schema: TypeAlias = dict[str, Any]

FOLDER: Final = Path(__file__).resolve().parents[1] / "manifests" / "crds"
_HEADER: Final = "# Made by `python -m apis.crds` from apis/resources. Changes belong there.\n"
_SERVED_DEFAULT: Final = "x-arks-served-default"
_EMPTY: Final[tuple[Any, ...]] = (None, "", 0, False, [], {})


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    path: str
    type: str = "string"
    priority: int = 0
    description: str = ""

    def as_dict(self) -> Schema:
        made: Schema = {"jsonPath": self.path, "name": self.name, "type": self.type}
        if self.description:
            made["description"] = self.description
        if self.priority:
            made["priority"] = self.priority
        return dict(sorted(made.items()))


@dataclass(frozen=True, slots=True)
class Face:
    """How a kind looks in kubectl."""

    short: tuple[str, ...]
    columns: tuple[Column, ...]
    scale: bool = False


def _condition(type_: str, description: str) -> Column:
    return Column(type_, f".status.conditions[?(@.type=='{type_}')].status", description=description)


_AGE: Final = Column("Age", ".metadata.creationTimestamp", "date")
_PHASE: Final = Column("Phase", ".status.phase")

FACES: Final = {
    "ArksApplication": Face(
        ("arkapp",),
        (
            _PHASE,
            _AGE,
            Column("Replicas", ".status.replicas"),
            Column("Ready", ".status.readyReplicas"),
            Column("Model", ".spec.model.name", priority=1),
            Column("Runtime", ".spec.runtime", priority=1),
            Column("Driver", ".status.driver", priority=1, description="what runs the pods: lws, rbg or deployment"),
        ),
        scale=True,
    ),
    "ArksDisaggregatedApplication": Face(
        ("arkdapp",),
        (
            _PHASE,
            _AGE,
            Column("Router Ready", ".status.router.readyReplicas"),
            Column("Prefill Ready", ".status.prefill.readyReplicas"),
            Column("Decode Ready", ".status.decode.readyReplicas"),
            Column("Model", ".spec.model.name", priority=1),
        ),
    ),
    "ArksEndpoint": Face(
        ("aep",),
        (
            _AGE,
            Column("Default Weight", ".spec.defaultWeight", "integer"),
            Column(
                "Model", ".spec.modelName", priority=1, description="public model name where it is not the object's"
            ),
            Column("Weights", ".spec.weightPolicy", priority=1),
            _condition("Programmed", "a Gateway carries its traffic to something that is ready"),
        ),
    ),
    "ArksModel": Face(
        ("am",),
        (
            _AGE,
            Column("Model", ".spec.model"),
            _PHASE,
            Column("Percent", ".status.progress.percent", "integer", description="loaded so far, while it loads"),
            Column("Revision", ".status.revision", priority=1),
        ),
    ),
    "ArksQuota": Face(
        ("aq",),
        (Column("AGE", ".metadata.creationTimestamp", "date"), _condition("Accepted", "nothing is wrong with it")),
    ),
    "ArksToken": Face(
        (),
        (
            _AGE,
            Column("Disabled", ".spec.disabled", "boolean"),
            Column("Expires", ".spec.expiresAt", "string", description="refused from this time on"),
            _condition("Accepted", "requests with it are served; its condition says why not"),
        ),
    ),
}


def definition(kind: str) -> Schema:
    """The CustomResourceDefinition of a kind."""
    face = FACES[kind]
    plural = f"{kind.lower()}s"
    names: Schema = {
        "categories": ["arks"],
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
    }
    if face.short:
        names["shortNames"] = list(face.short)
    subresources: Schema = {"status": {}}
    if face.scale:
        subresources["scale"] = {
            "labelSelectorPath": ".status.selector",
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": names,
            "scope": "Namespaced",
            "versions": [
                {
                    "additionalPrinterColumns": [column.as_dict() for column in face.columns],
                    "name": VERSION,
                    "schema": {"openAPIV3Schema": schema(kind)},
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                }
            ],
        },
    }


def schema(kind: str) -> Schema:
    """The structural schema of a kind's objects."""
    model = KINDS[kind]
    whole = model.model_json_schema(by_alias=True, mode="validation")
    described = {key: value for key, value in whole.items() if key == "description"}
    tree = _Structural(whole.get("$defs", {}))
    properties = whole["properties"]
    return {
        **described,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": tree.made(properties["spec"]),
            "status": tree.made(properties["status"]),
        },
        "required": ["spec"],
        "type": "object",
    }


class _Structural:
    """pydantic's JSON schema to the subset that an API server takes."""

    def __init__(self, definitions: dict[str, Schema]) -> None:
        self._definitions = definitions

    def made(self, given: Schema) -> Schema:
        source = self._resolved(given)
        served = source.pop(_SERVED_DEFAULT, False)
        made: Schema = {}
        for key, value in source.items():
            match key:
                case "title" | "$defs":
                    continue
                case "default":
                    if served or not _is_empty(value):
                        made["default"] = value
                case "const":
                    made["enum"] = [value]
                case "properties":
                    made["properties"] = {name: self.made(part) for name, part in sorted(value.items())}
                case "items":
                    made["items"] = self.made(value)
                case "additionalProperties":
                    # A map's values. `true` (extra="allow") is said by preserve-unknown-fields instead.
                    if isinstance(value, dict):
                        made["additionalProperties"] = self.made(value)
                case "minimum" | "maximum" if value in {*INT32, *INT64}:
                    continue  # the format says so
                case _:
                    made[key] = value
        if "type" not in made and "x-kubernetes-int-or-string" not in made:
            raise ValueError(f"no type: {made}")
        return dict(sorted(made.items()))

    def _resolved(self, given: Schema) -> Schema:
        """Without references, and without the `null` that says a field may be left out."""
        source = dict(given)
        while True:
            if "$ref" in source:
                name = source.pop("$ref").rpartition("/")[2]
                source = {**self._definitions[name], **source}
            elif "x-kubernetes-int-or-string" not in source and "anyOf" in source:
                branches = [branch for branch in source.pop("anyOf") if branch.get("type") != "null"]
                if len(branches) != 1:
                    raise ValueError(f"a union that no structural schema can hold: {given}")
                source = {**branches[0], **source}
            else:
                return source


def _is_empty(value: Any) -> bool:
    return any(value is empty or (type(value) is type(empty) and value == empty) for empty in _EMPTY)


def text(kind: str) -> str:
    """The file of a kind."""
    return _HEADER + yaml.dump(definition(kind), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """Every value written out where it stands: kubectl takes aliases, readers do not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (folder / f"{GROUP}_{kind.lower()}s.yaml").write_text(text(kind), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
