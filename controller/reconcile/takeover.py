"""Objects that Arks made become ours whole, not merged with ours.

Server-side apply removes what its manager applied before and no longer names, and leaves what anybody else wrote.
Arks wrote with plain updates as the manager `manager` (its binary's name): applying over that would keep every old
argument, port and label that we do not name. So the old manager's fields are first declared to be what we applied;
the apply that follows then removes those that we do not want. Kubernetes' own migration from client-side apply works
in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from controller.kube.client import FIELD_MANAGER, JSON_PATCH, Client, Object
from controller.kube.errors import ConflictError, InvalidError, NotFoundError
from controller.kube.resource import Resource

ARKS_MANAGERS: Final = frozenset({"manager"})


def arks_owns_fields(entries: Iterable[Mapping[str, Any]]) -> bool:
    return any(_is_update_of(entry, ARKS_MANAGERS) for entry in entries)


def _is_update_of(entry: Mapping[str, Any], managers: frozenset[str] | None) -> bool:
    """`managers` None: anybody's."""
    if entry.get("operation") != "Update" or entry.get("subresource"):
        return False
    return managers is None or entry.get("manager") in managers


def taken_over(
    entries: Iterable[Mapping[str, Any]], api_version: str, managers: frozenset[str] | None = ARKS_MANAGERS
) -> list[Object]:
    """The `managedFields` in which those managers' updates are one apply of ours."""
    kept: list[Object] = []
    fields: Object = {}
    found = False
    for entry in entries:
        mine = entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply"
        if _is_update_of(entry, managers) or (mine and not entry.get("subresource")):
            _merge(fields, entry.get("fieldsV1") or {})
            found = True
        else:
            kept.append(dict(entry))
    if found:
        ours = {"manager": FIELD_MANAGER, "operation": "Apply", "apiVersion": api_version, "fieldsType": "FieldsV1"}
        kept.append({**ours, "fieldsV1": fields})
    return kept


def _merge(into: Object, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        _merge(into.setdefault(key, {}), value)


async def take_over(client: Client, resource: Resource, live: Object, *, everyones: bool = False) -> None:
    """Rewrite the owners of a live object's fields. Should it change meanwhile, the next pass does it.

    `everyones`: fields of any manager's updates, for what another controller made on Arks' behalf.
    """
    meta = live["metadata"]
    managers = None if everyones else ARKS_MANAGERS
    entries = taken_over(meta["managedFields"], resource.api_version, managers)
    patch = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": meta["resourceVersion"]},
        {"op": "replace", "path": "/metadata/managedFields", "value": entries},
    ]
    try:
        await client.patch(resource, meta["name"], meta.get("namespace", ""), patch, kind=JSON_PATCH)
    except NotFoundError:
        return
    except InvalidError as error:
        if error.status == 422 and "test" in error.message.lower():
            raise ConflictError(409, f"{resource.kind} {meta['name']} changed meanwhile") from error
        raise
