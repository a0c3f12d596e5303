"""Has a watch heard of all that there is? Two watches are never in step, and any of them may be seconds late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

from controller.kube.reflector import Reflector
from controller.kube.resource import Key
from tests.harness.kubernetes import KubeApi, KubeError


def behind(api: KubeApi, reflectors: Iterable[Reflector[Any]]) -> list[str]:
    """Kinds of which the API server has something else than the store. A kind that it does not serve has nothing."""
    return [each.resource.kind for each in reflectors if _stored(each) != _served(api, each)]


def _stored(reflector: Reflector[Any]) -> dict[Key, str]:
    entries = ((key, reflector.store.entry(key)) for key in list(reflector.store))
    return {key: entry.version for key, entry in entries if entry is not None and key not in reflector.malformed}


def _served(api: KubeApi, reflector: Reflector[Any]) -> dict[Key, str]:
    path = reflector.resource.path(reflector._namespace)
    try:
        items = api.request("GET", f"{path}?{urlencode(reflector._params)}")["items"]
    except KubeError as error:
        if error.status == 404:
            return {}
        raise
    found = {Key(meta.get("namespace", ""), meta["name"]): meta["resourceVersion"] for meta in map(_meta, items)}
    return {key: version for key, version in found.items() if key not in reflector.malformed}


def _meta(item: dict[str, Any]) -> dict[str, str]:
    return item["metadata"]
