"""A policy folder read for the user's sake: which models it has, and a token whose secret can be shown.

Only a glance for messages and for a generated policy; what the folder *means* is extproc.snapshot's to say. What this
module cannot read it leaves out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Document: TypeAlias = dict[str, Any]

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Example:
    """A request that the policy lets through."""

    secret: str
    model: str


def documents(folder: Path) -> Iterator[Document]:
    """Every readable YAML document that is an object with a kind."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file() or path.name.startswith("."):
            continue
        try:
            read = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        yield from (each for each in read if isinstance(each, dict) and isinstance(each.get("kind"), str))


def example(folder: Path) -> Example | None:
    """The first token with a plain secret and its first model; None where there is none."""
    read = list(documents(folder))
    models = {_key(each): _model(each) for each in read if each["kind"] == "ArksEndpoint"}
    for each in read:
        if each["kind"] != "ArksToken":
            continue
        secret = _get(each, "spec", "token")
        grants = _get(each, "spec", "qos")
        namespace, _ = _key(each)
        for grant in grants if isinstance(grants, list) else ():
            model = models.get((namespace, _get(grant, "arksEndpoint", "name") or ""))
            if isinstance(secret, str) and secret and model and not _get(each, "spec", "disabled"):
                return Example(secret, model)
    return None


def default_models(folder: Path) -> list[str]:
    """Public names of the endpoints that the process's default engines serve."""
    endpoints = (each for each in documents(folder) if each["kind"] == "ArksEndpoint")
    return list(dict.fromkeys(_model(each) for each in endpoints if not _get(each, "spec", "routeConfigs")))


def _key(document: Document) -> tuple[str, str]:
    return str(_get(document, "metadata", "namespace") or "default"), str(_get(document, "metadata", "name") or "")


def _model(document: Document) -> str:
    return str(_get(document, "spec", "modelName") or _key(document)[1])


def _get(tree: Any, *path: str) -> Any:
    for step in path:
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree
