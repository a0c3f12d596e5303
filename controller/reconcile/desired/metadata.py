"""Labels and owner references that every object made for a resource carries."""

from __future__ import annotations

from typing import Any

from apis.resources.base import API_VERSION, Resource
from controller.workloads.model import APPLICATION_LABEL, MODEL_LABEL, Object

MANAGED_BY = {"managed-by": "arks"}
SCRAPED = {"prometheus-discovery": "true", **MANAGED_BY}
ENDPOINT_LABEL = "arks.ai/endpoint"
LABEL_MAX = 63  # characters of a label's value


def owner_reference(resource: Resource) -> Object:
    """The controller reference: what we make goes when its resource goes."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind_of(resource),
        "name": resource.metadata.name,
        "uid": resource.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def kind_of(resource: Resource) -> str:
    return type(resource).__name__


def application_labels(resource: Resource, model: str) -> dict[str, str]:
    return {APPLICATION_LABEL: resource.metadata.name, MODEL_LABEL: model}


def object_metadata(resource: Resource, name: str, labels: dict[str, str]) -> Object:
    return {
        "name": name,
        "namespace": resource.metadata.namespace,
        "labels": labels,
        "ownerReferences": [owner_reference(resource)],
    }


def plain(tree: Any) -> Any:
    """A pydantic model as the API server would show it: no unset fields, names in camelCase."""
    return tree.model_dump(mode="json", by_alias=True, exclude_none=True)


def owned_by(item: Object, resource: Resource) -> bool:
    references = item["metadata"].get("ownerReferences") or ()
    return any(reference.get("uid") == resource.metadata.uid for reference in references)
