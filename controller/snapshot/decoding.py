"""Foreign objects as they come from an API server, to fragments: what a route needs to know of them, and no more.

Go writes empty lists as null and list items without their kind; both are put right before the typed models look.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from apis.fragments import fragment
from controller.kube.client import Decode

T = TypeVar("T")

_KEPT: Final = ("spec", "addressType", "endpoints", "ports")
_META: Final = ("name", "namespace", "labels")
_json = msgspec.json.Decoder(dict[str, Any]).decode


def fragments(kind: type[Any], made: type[T]) -> Decode[T]:
    """Decoder of one of `apis.resources.kubernetes`' kinds."""
    head = {"kind": kind.model_fields["kind"].default, "apiVersion": _api_version(kind)}

    def decode(raw: bytes) -> T:
        item = _json(raw)
        meta = {name: item["metadata"][name] for name in _META if name in item["metadata"]}
        tree: dict[str, Any] = {**head, "metadata": meta, **{name: item[name] for name in _KEPT if name in item}}
        found = fragment(kind.model_validate(_without_null(tree)))
        assert isinstance(found, made)
        return found

    return decode


def _api_version(kind: type[Any]) -> str:
    (version,) = kind.model_fields["api_version"].annotation.__args__
    return str(version)


def _without_null(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_null(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_null(value) for value in tree]
    return tree
