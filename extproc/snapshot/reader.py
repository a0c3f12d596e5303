"""One piece of a file (what stands between two `---` lines) to policy fragments, faults and remarks.

A pure function of the text, so its result is kept as long as the text stays the same. Lines count from 0 within the
piece; whoever knows the file adds its place. Of a token nothing is kept but its digest.
"""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec
from pydantic import BaseModel, ValidationError

from apis.fragments import EndpointFragment, Fragment, Source, TokenFragment, fragment
from apis.resources import KINDS
from apis.resources.base import API_VERSION, GROUP, Foreign, ObjectMeta, Resource
from apis.resources.kubernetes import FOREIGN_KINDS
from extproc.snapshot.yamltree import Document, Lines, Path, YAMLFault, documents

_POLICY_KINDS: Final = frozenset(("ArksToken", "ArksQuota", "ArksEndpoint"))
_META_FIELDS: Final = frozenset(field.alias or name for name, field in ObjectMeta.model_fields.items())
_SPEAKABLE: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
"""field names; anything else may be a secret in the wrong place"""


class Fault(NamedTuple):
    line: int
    path: str
    problem: str
    fix: str = ""


class Remark(NamedTuple):
    line: int
    path: str
    text: str


class Item(msgspec.Struct, frozen=True, gc=False):
    """One object."""

    line: int
    """of its name"""
    fragment: Fragment
    places: tuple[tuple[str, int], ...]
    """lines of the fields that other objects can make wrong"""


class Piece(msgspec.Struct, frozen=True, gc=False):
    items: tuple[Item, ...]
    faults: tuple[Fault, ...]
    remarks: tuple[Remark, ...]


def read(text: bytes) -> Piece:
    """Never raises: what is wrong is in `faults`, all of it that can be known at once."""
    items: list[Item] = []
    faults: list[Fault] = []
    remarks: list[Remark] = []
    try:
        for document in documents(text):
            for value, at in _objects(document):
                _object(value, at, document.lines, items, faults, remarks)
    except YAMLFault as fault:
        faults.append(Fault(fault.line, shown(fault.path), fault.problem, fault.fix))
    return Piece(tuple(items), tuple(faults), tuple(remarks))


def _objects(document: Document) -> Iterator[tuple[Any, Path]]:
    """A document's objects: itself, or a List's items (as `kubectl get -o yaml` writes them)."""
    value = document.value
    if isinstance(value, dict) and str(value.get("kind", "")).endswith("List") and isinstance(value.get("items"), list):
        for index, item in enumerate(value["items"]):
            yield item, ("items", index)
    else:
        yield value, ()


def _object(value: Any, at: Path, lines: Lines, items: list[Item], faults: list[Fault], remarks: list[Remark]) -> None:
    start = _line(lines, at)
    if not isinstance(value, dict):
        faults.append(Fault(start, shown(at), "is no Kubernetes object", "begin with apiVersion, kind, metadata"))
        return
    kind, api_version = value.get("kind"), value.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(api_version, str):
        missing = "kind" if not isinstance(kind, str) else "apiVersion"
        faults.append(
            Fault(
                _line(lines, (*at, missing)),
                shown((*at, missing)),
                "is required, as text",
                f"for example apiVersion: {API_VERSION} and kind: ArksToken",
            )
        )
        return
    model = _model(kind, api_version)
    if model is None:
        if kind in KINDS:
            place = (*at, "apiVersion")
            faults.append(Fault(_line(lines, place), shown(place), "is an unknown version", f"write {API_VERSION}"))
            return
        place = (*at, "kind")
        if api_version.partition("/")[0] == GROUP:
            # Misspelt, not foreign: passed over it would take away a token, a quota or an endpoint that is in force.
            close = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0)[0]
            faults.append(Fault(_line(lines, place), shown(place), f"is no kind of {GROUP}", f"did you mean {close}?"))
        else:
            remarks.append(Remark(_line(lines, place), shown(place), "this kind is not understood and ignored"))
        return
    policy = kind in _POLICY_KINDS
    try:
        parsed = model.model_validate(_trimmed(value), extra="forbid" if policy else None)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        faults += (_fault(dict(one), at, lines, model) for one in found)
        return
    if isinstance(parsed, Resource) and not policy:
        remarks.append(
            Remark(
                _line(lines, (*at, "kind")), shown((*at, "kind")), f"{kind} is left to the controller and ignored here"
            )
        )
        return
    made = fragment(_source(parsed))
    items.append(Item(_line(lines, (*at, "metadata", "name")), made, _places(made, at, lines)))


def _model(kind: str, api_version: str) -> type[Resource | Foreign] | None:
    if api_version == API_VERSION:
        return KINDS.get(kind)
    return FOREIGN_KINDS.get((api_version, kind))


def _source(parsed: Any) -> Source:
    """The dispatch above lets nothing else through."""
    source: Source = parsed
    return source


def _trimmed(value: dict[str, Any]) -> dict[str, Any]:
    """Without what an API server adds and a policy does not need: status, managedFields and their like."""
    kept = {key: part for key, part in value.items() if key != "status"}
    meta = kept.get("metadata")
    if isinstance(meta, dict):
        kept["metadata"] = {key: part for key, part in meta.items() if key in _META_FIELDS}
    return kept


def _places(made: Fragment, at: Path, lines: Lines) -> tuple[tuple[str, int], ...]:
    if isinstance(made, TokenFragment):
        wanted: list[Path] = [("spec", "qos")]
        if made.secret is not None:
            wanted += [("spec", "tokenSecretRef", "name"), ("spec", "tokenSecretRef", "key")]
        if made.remarks:
            wanted += (path[len(at) :] for path in lines if len(path) == len(at) + 3 and path[-2] == "qos")
    elif isinstance(made, EndpointFragment):
        wanted = [("spec", "routeConfigs", index) for index in range(len(made.refs))]
        if ("spec", "modelName") in lines:
            wanted.append(("spec", "modelName"))
    else:
        return ()
    return tuple((shown(path), _line(lines, (*at, *path))) for path in wanted)


def _line(lines: Lines, path: Path) -> int:
    """The line of a field, or of the nearest thing around it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)


def shown(path: Path) -> str:
    """spec.qos[0].rateLimits[1].value"""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _SPEAKABLE.fullmatch(part) else "<key>")
    return text


_EXPECTED: Final = {
    "missing": ("is required", ""),
    "int_type": ("must be a whole number", "write it without quotes"),
    "bool_type": ("must be true or false", "write it without quotes"),
    "string_type": ("must be text", "put it in quotes"),
    "list_type": ("must be a list", "begin each entry with '- '"),
    "dict_type": ("must be a mapping of fields", ""),
    "model_type": ("must be a mapping of fields", ""),
    "model_attributes_type": ("must be a mapping of fields", ""),
}


def _fault(error: dict[str, Any], at: Path, lines: Lines, model: type[BaseModel]) -> Fault:
    kind: str = error["type"]
    path: Path = (*at, *error["loc"])
    if kind != "missing":
        # A union's error names the branch it tried, which is no field of the file.
        while path and path not in lines:
            path = path[:-1]
    problem, fix = _EXPECTED.get(kind, ("", ""))
    ctx = error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            problem = f"is no field of {model.__name__}" if len(path) - len(at) == 1 else "is not a known field here"
            close = difflib.get_close_matches(str(path[-1]), _field_names(model), n=1) if path else []
            fix = f"did you mean {close[0]}?" if close else "remove it, or check the indentation"
        case "literal_error":
            problem = f"must be {ctx.get('expected')}"
        case "greater_than_equal":
            problem = f"must be at least {ctx.get('ge')}"
        case "less_than_equal":
            problem = f"must be at most {ctx.get('le')}"
        case "string_pattern_mismatch":
            problem = f"does not have the form {ctx.get('pattern')}"
        case "string_too_short" | "too_short":
            problem = "must not be empty"
        case "string_too_long" | "too_long":
            problem = f"must not be longer than {ctx.get('max_length')}"
        case "value_error":
            problem = str(ctx.get("error"))
        case _ if not problem:
            problem = f"is not as it must be ({kind.replace('_', ' ')})"
        case _:
            pass
    return Fault(_line(lines, path), shown(path), problem, fix)


@cache
def _field_names(model: type[BaseModel]) -> tuple[str, ...]:
    """Every field name in a kind's tree, for hints."""
    schema = model.model_json_schema()
    tables = (schema, *schema.get("$defs", {}).values())
    return tuple(sorted({name for table in tables for name in table.get("properties", {})}))
