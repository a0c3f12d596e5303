"""How foreign objects are kept: whole enough to plan and to compare, and no more.

Everything is plain JSON trees, as the planning functions take them. `managedFields` stay only where Arks' own manager
still owns fields (see `takeover`); a pod is reduced to what tells its state; a Secret to digests of its values, so that
no secret is ever held.
"""

from __future__ import annotations

from typing import Any

import msgspec

from apis.fragments import SecretFragment, fragment
from apis.resources.kubernetes import Secret
from controller.kube.client import Decode, Object
from controller.kube.resource import Resource
from controller.reconcile.takeover import arks_owns_fields
from controller.workloads.model import TEMPLATE_HASH

_json = msgspec.json.Decoder(dict[str, Any]).decode
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def decode_object(resource: Resource) -> Decode[Object]:
    """A decoder that names the kind: the items of a list do not."""

    def decode(raw: bytes) -> Object:
        item = _json(raw)
        item["apiVersion"], item["kind"] = resource.api_version, resource.kind
        meta = item["metadata"]
        if not arks_owns_fields(meta.get("managedFields", ())):
            meta.pop("managedFields", None)
        if meta.get("annotations"):
            meta["annotations"].pop(_LAST_APPLIED, None)
        return item

    return decode


_POD_META = ("name", "namespace", "uid", "labels", "deletionTimestamp", "ownerReferences", "creationTimestamp")


def decode_pod(raw: bytes) -> Object:
    """Identity, readiness, and why a container waits or ended."""
    item = _json(raw)
    meta, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    kept = {key: meta[key] for key in _POD_META if key in meta}
    mark = (meta.get("annotations") or {}).get(TEMPLATE_HASH)
    if mark is not None:
        kept["annotations"] = {TEMPLATE_HASH: mark}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": kept,
        "spec": {"nodeName": spec.get("nodeName", "")},
        "status": {
            "phase": status.get("phase", ""),
            "conditions": [each for each in status.get("conditions", ()) if each["type"] in {"Ready", "PodScheduled"}],
            "containerStatuses": [
                {"name": each["name"], "state": each.get("state", {})} for each in status.get("containerStatuses", ())
            ],
        },
    }


def decode_node(raw: bytes) -> Object:
    item = _json(raw)
    meta, spec, status = item["metadata"], item.get("spec", {}), item.get("status", {})
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": meta["name"], "labels": meta.get("labels", {})},
        "spec": {"unschedulable": spec.get("unschedulable", False)},
        "status": {"conditions": [each for each in status.get("conditions", ()) if each["type"] == "Ready"]},
    }


class _SecretMeta(msgspec.Struct):
    name: str
    namespace: str


class _Secret(msgspec.Struct):
    metadata: _SecretMeta
    data: dict[str, str] | None = None


_secret = msgspec.json.Decoder(_Secret).decode


def decode_secret(raw: bytes) -> SecretFragment:
    """By key, the SHA-256 of the value, exactly as the data plane will compare it."""
    found = _secret(raw)
    meta = {"name": found.metadata.name, "namespace": found.metadata.namespace}
    made = fragment(Secret.model_validate({"apiVersion": "v1", "metadata": meta, "data": found.data or {}}))
    assert isinstance(made, SecretFragment)
    return made


def owners(item: Object) -> list[Object]:
    return item["metadata"].get("ownerReferences") or []


def uid_of(item: Object) -> str:
    return str(item["metadata"].get("uid", ""))
