"""The CustomResourceDefinitions: up to date, structural, and accepting everything that Arks' own accept."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from apis import crds
from apis.crds import FOLDER, definition, text
from apis.resources import KINDS

schema = cache(crds.schema)

FACTS = Path(__file__).with_name("arks_schema.tsv")

# scitix/arks config/crd/bases: short names, and printer columns as (name, JSON path, type).
FACES = {
    "ArksApplication": (
        ["arkapp"],
        [
            ("Phase", ".status.phase", "string"),
            ("Age", ".metadata.creationTimestamp", "date"),
            ("Replicas", ".status.replicas", "string"),
            ("Ready", ".status.readyReplicas", "string"),
            ("Model", ".spec.model.name", "string"),
            ("Runtime", ".spec.runtime", "string"),
            ("Driver", ".status.driver", "string"),  # Arks reads .spec.driver, which nothing ever sets
        ],
    ),
    "ArksDisaggregatedApplication": (
        ["arkdapp"],
        [
            ("Phase", ".status.phase", "string"),
            ("Age", ".metadata.creationTimestamp", "date"),
            ("Router Ready", ".status.router.readyReplicas", "string"),
            ("Prefill Ready", ".status.prefill.readyReplicas", "string"),
            ("Decode Ready", ".status.decode.readyReplicas", "string"),
            ("Model", ".spec.model.name", "string"),
        ],
    ),
    "ArksEndpoint": (
        ["aep"],
        [("Age", ".metadata.creationTimestamp", "date"), ("Default Weight", ".spec.defaultWeight", "integer")],
    ),
    "ArksModel": (
        ["am"],
        [
            ("Age", ".metadata.creationTimestamp", "date"),
            ("Model", ".spec.model", "string"),
            ("Phase", ".status.phase", "string"),
        ],
    ),
    "ArksQuota": (["aq"], [("AGE", ".metadata.creationTimestamp", "date")]),
    "ArksToken": ([], []),
}

# Where we refuse what Arks lets in, on purpose. (kind, path): constraints.
STRICTER = {
    ("*", "."): {"required"},  # an object without a spec
    ("ArksToken", ".spec.token"): {"minLength", "pattern"},  # an empty one, or one that no header can carry
    ("*", ".spec.instanceSpec.volumes"): {"maxItems"},  # bounds the cost of the rule on names
    ("*", ".spec.instanceSpec.volumeMounts"): {"maxItems"},
}
# List types say how appliers merge, not what is accepted; ours are per field as SSA needs them.
MERGING = {"x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"}
LOWER = {"minimum", "minItems", "minLength"}
UPPER = {"maximum", "maxItems", "maxLength"}


def facts() -> list[tuple[str, str, str, dict[str, Any]]]:
    rows = [line.split("\t") for line in FACTS.read_text().splitlines() if not line.startswith("#")]
    return [(kind, path, type_, json.loads(rest) if rest else {}) for kind, path, type_, rest in rows]


def at(kind: str, path: str) -> dict[str, Any] | None:
    """Our schema at a path of the table; None below something that keeps unknown fields."""
    node = schema(kind)
    for part in re.findall(r"\.([\w]+)|(\[\])|(\{\})", path if path != "." else ""):
        name, item, value = part
        if item:
            child = node.get("items")
        elif value:
            child = node.get("additionalProperties")
        else:
            child = node.get("properties", {}).get(name)
        if child is None:
            assert node.get("x-kubernetes-preserve-unknown-fields"), f"{kind}{path}: no {part}"
            return None
        node = child
    return node


def type_of(node: dict[str, Any]) -> str:
    return "int-or-string" if node.get("x-kubernetes-int-or-string") else node["type"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_path_type_enum_and_default_of_arks_is_ours(kind):
    rows = [row for row in facts() if row[0] == kind]
    assert rows
    for _, path, type_, theirs in rows:
        ours = at(kind, path)
        if ours is None:
            continue
        where = f"{kind}{path}"
        assert type_of(ours) == type_, where
        assert ours.get("default") == theirs.get("default"), where
        assert set(ours.get("enum", theirs.get("enum", []))) >= set(theirs.get("enum", [])), where
        stricter = STRICTER.get((kind, path), STRICTER.get(("*", path), set()))
        if "required" not in stricter:
            assert set(ours.get("required", [])) <= set(theirs.get("required", [])), where
        for name in (LOWER | UPPER | {"pattern", "format"}) - stricter:
            if name in {"pattern", "format"}:
                assert ours.get(name) in {None, theirs.get(name)}, f"{where} {name}"
            elif name in ours:
                assert name in theirs, f"{where} {name}"
                assert ours[name] <= theirs[name] if name in LOWER else ours[name] >= theirs[name], f"{where} {name}"


def test_the_table_has_every_kind_and_its_depth():
    rows = facts()
    assert {row[0] for row in rows} == set(KINDS)
    assert ("ArksDisaggregatedApplication", ".spec.router.int32", "integer", {"format": "int32"}) in rows
    assert len(rows) > 400


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_names_and_columns_are_arks(kind):
    made = definition(kind)
    names, version = made["spec"]["names"], made["spec"]["versions"][0]
    short, columns = FACES[kind]
    assert made["metadata"]["name"] == f"{kind.lower()}s.arks.ai"
    assert (made["spec"]["group"], made["spec"]["scope"], version["name"]) == ("arks.ai", "Namespaced", "v1")
    assert names.get("shortNames", []) == short
    found = [(column["name"], column["jsonPath"], column["type"]) for column in version["additionalPrinterColumns"]]
    assert found[: len(columns)] == columns
    assert version["subresources"]["status"] == {}


@pytest.mark.parametrize(
    ("kind", "type_"), [("ArksEndpoint", "Programmed"), ("ArksQuota", "Accepted"), ("ArksToken", "Accepted")]
)
def test_a_kind_without_phases_shows_in_its_columns_whether_it_works(kind, type_):
    columns = definition(kind)["spec"]["versions"][0]["additionalPrinterColumns"]
    assert (type_, f".status.conditions[?(@.type=='{type_}')].status") == (columns[-1]["name"], columns[-1]["jsonPath"])


def test_an_application_can_be_scaled():
    version = definition("ArksApplication")["spec"]["versions"][0]
    scale = version["subresources"]["scale"]
    for path in scale.values():
        assert at("ArksApplication", path)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_written_files_are_up_to_date(kind):
    file = FOLDER / f"arks.ai_{kind.lower()}s.yaml"
    assert file.read_text() == text(kind), "run: python -m apis.crds"
    assert yaml.safe_load(file.read_text()) == definition(kind)


def test_nothing_else_is_in_the_folder():
    assert {file.name for file in FOLDER.glob("*.yaml")} == {f"arks.ai_{kind.lower()}s.yaml" for kind in KINDS}


STRUCTURAL = {
    "additionalProperties",
    "anyOf",
    "default",
    "description",
    "enum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}


def nodes(node: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)]
    for name, child in node.get("properties", {}).items():
        found += nodes(child, f"{path}.{name}")
    if "items" in node:
        found += nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        found += nodes(node["additionalProperties"], f"{path}{{}}")
    return found


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_schema_is_structural(kind):
    """The rules of apiextensions.k8s.io/v1 for structural schemas, as far as they can be broken here."""
    for path, node in nodes(schema(kind)):
        assert set(node) <= STRUCTURAL, path
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
        else:
            assert node["type"] in {"object", "array", "string", "integer", "boolean"}, path
            assert "anyOf" not in node, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert (node.get("type") == "array") == ("items" in node), path
        assert set(node.get("required", [])) <= set(node.get("properties", {})), path
        if node.get("x-kubernetes-list-type") == "map":
            required = node["items"]["required"]
            assert set(node["x-kubernetes-list-map-keys"]) <= set(required), path
        if "default" in node:
            assert node["default"] is not None, path


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rules_read_only_fields_that_are_there(kind):
    """`self.x` without has(self.x) fails at run time where x is absent: it must be required or have a default."""
    for path, node in nodes(schema(kind)):
        for rule in node.get("x-kubernetes-validations", []):
            guarded = set(re.findall(r"has\(self\.(\w+)", rule["rule"]))
            for name in set(re.findall(r"self\.(\w+)", rule["rule"])) - guarded:
                assert name in node["properties"], f"{path}: {name}"
                assert name in node.get("required", []) or "default" in node["properties"][name], f"{path}: {name}"
            assert guarded <= set(node["properties"]), path
