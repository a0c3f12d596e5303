"""Resources in, objects out, word for word. After a wanted change run ``python -m tests.desired.cases`` and read it."""

from __future__ import annotations

import pytest
import yaml

from tests.desired.cases import GOLDEN, expected_path, rendered, results

SOURCES = sorted(GOLDEN.glob("*.in.yaml"))


@pytest.mark.parametrize("source", SOURCES, ids=[item.name for item in SOURCES])
def test_objects_are_as_reviewed(source):
    assert rendered(source) == expected_path(source).read_text(encoding="utf-8")


@pytest.mark.parametrize("source", SOURCES, ids=[item.name for item in SOURCES])
def test_every_object_is_owned_and_in_its_resources_namespace(source):
    found = results(source)["objects"]
    assert found
    for item in found:
        (owner,) = item["metadata"]["ownerReferences"]
        assert owner["controller"] is True
        assert owner["uid"]
        assert item["metadata"]["namespace"] == "team-a"
        assert yaml.safe_load(yaml.safe_dump(item)) == item


@pytest.mark.parametrize("source", SOURCES, ids=[item.name for item in SOURCES])
def test_nothing_that_server_side_apply_refuses_is_in_any_list(source):
    """Lists that the API keys by name (or port, or path) must not hold a key twice."""
    keys = {
        "env": "name",
        "volumes": "name",
        "containers": "name",
        "ports": "name",
        "volumeMounts": "mountPath",
        "headers": "name",
    }

    def walk(tree):
        if isinstance(tree, dict):
            for key, value in tree.items():
                if key in keys and isinstance(value, list) and value and isinstance(value[0], dict):
                    names = [entry[keys[key]] for entry in value]
                    assert len(names) == len(set(names)), (key, names)
                walk(value)
        elif isinstance(tree, list):
            for value in tree:
                walk(value)

    for item in results(source)["objects"]:
        walk(item)
