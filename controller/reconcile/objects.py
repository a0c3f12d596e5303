"""How foreign objects are kept: whole enough to plan and to compare, and no more.

Everything is plain JSON trees, as the planning functions take them. Of a spec stays what somebody reads: drift is told
by the resourceVersion, and a thousand runtimes' specs would be the most of what this process holds. `managedFields`
stay only where Arks' own manager still owns fields (see `takeover`); a pod is reduced to what tells its state; a Secret
to digests of its values, so that no secret is ever held. Our own kinds are typed, and as lean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from pydantic import BaseModel

from apis.fragments import SecretFragment, fragment
from apis.resources.base import Resource as ArksResource
from apis.resources.kubernetes import Secret
from controller.kube.client import Decode, Object, decoder
from controller.kube.resource import Resource
from controller.reconcile.takeover import arks_owns_fields
from controller.workloads.model import TEMPLATE_HASH

M = TypeVar("M", bound=ArksResource)

_json = msgspec.json.Decoder(dict[str, Any]).decode
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_GIVEN: Final[set[str]] = set()


def decode_resource(kind: type[M]) -> Decode[M]:
    """A decoder of one of our kinds."""
    typed = decoder(kind)

    def decode(raw: bytes) -> M:
        resource: M = typed(raw)
        resource.metadata.annotations.pop(_LAST_APPLIED, None)
        _share_sets(resource)
        return resource

    return decode


def _share_sets(model: BaseModel) -> None:
    """Which fields were given is asked by nobody, and each model keeps a set of them: a third of its size."""
    object.__setattr__(model, "__pydantic_fields_set__", _GIVEN)
    for value in vars(model).values():
        for each in value if type(value) is list else (value,):
            if isinstance(each, BaseModel):
                _share_sets(each)


class _Tree(msgspec.Struct):
    metadata: Object
    spec: msgspec.Raw = msgspec.Raw(b"{}")
    status: Object | None = None


_tree = msgspec.json.Decoder(_Tree).decode


def decode_object(resource: Resource) -> Decode[Object]:
    """A decoder that names the kind: the items of a list do not."""
    read = _READ.get(resource.kind)

    def decode(raw: bytes) -> Object:
        tree = _tree(raw)
        meta = tree.metadata
        if not arks_owns_fields(meta.get("managedFields", ())):
            meta.pop("managedFields", None)
        if meta.get("annotations"):
            meta["annotations"].pop(_LAST_APPLIED, None)
        item: Object = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": meta}
        if tree.status is not None:
            item["status"] = tree.status
        spec = read(meta, tree.spec) if read is not None else None
        if spec is not None:
            item["spec"] = spec
        return item

    return decode


def _whole(_meta: Object, spec: msgspec.Raw) -> Object:
    return _json(spec)


def _selector(_meta: Object, spec: msgspec.Raw) -> Object:
    """Which pods a router of Arks has."""
    return {"selector": _json(spec).get("selector", {})}


def _rules_of_nobody(meta: Object, spec: msgspec.Raw) -> Object | None:
    """By its matches a route is known to be of Arks; one that has an owner, by that."""
    return None if meta.get("ownerReferences") else _json(spec)


def _labels_of_roles(_meta: Object, spec: msgspec.Raw) -> Object:
    """Whose group it is, where its set is gone."""
    metas = [(role.get("template") or {}).get("metadata") or {} for role in _json(spec).get("roles") or ()]
    return {"roles": [{"template": {"metadata": {"labels": meta.get("labels") or {}}}} for meta in metas]}


_READ: Final[Mapping[str, Callable[[Object, msgspec.Raw], Object | None]]] = {
    "Deployment": _selector,
    "HTTPRoute": _rules_of_nobody,
    "Job": _whole,
    "PersistentVolumeClaim": _whole,
    "RoleBasedGroup": _labels_of_roles,
}
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
