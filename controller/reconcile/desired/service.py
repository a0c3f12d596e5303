"""Services and the router's permissions: names and labels are Arks', so selectors and dashboards go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apis.resources.base import Resource
from controller.engines.model import SERVING_PORT
from controller.reconcile.desired.metadata import MANAGED_BY, object_metadata
from controller.workloads.model import Object

RBAC = "rbac.authorization.k8s.io"


def service_name(application: str) -> str:
    return f"arks-application-{application}"


def service(
    resource: Resource,
    *,
    labels: Mapping[str, str],
    selector: Mapping[str, str],
    port: int = SERVING_PORT,
    target_port: int | None = None,
    metrics_port: int | None = None,
) -> Object:
    """What routes point at: the pods that answer, and only they."""
    ports = [{"name": "http", "port": port, "protocol": "TCP", "targetPort": target_port or port}]
    if metrics_port is not None and metrics_port not in (port, target_port):
        ports.append({"name": "metrics", "port": metrics_port, "protocol": "TCP", "targetPort": metrics_port})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": object_metadata(resource, service_name(resource.metadata.name), dict(labels)),
        "spec": {"selector": dict(selector), "ports": ports},
    }


def dynamo_discovery_service(resource: Resource, *, selector: Mapping[str, str], labels: Mapping[str, str]) -> Object:
    """Dynamo's runtimes read the EndpointSlices of Services with these labels to learn who is ready."""
    marks = {
        "nvidia.com/dynamo-discovery-backend": "kubernetes",
        "nvidia.com/dynamo-discovery-enabled": "true",
    }
    name = f"arks-dynamo-{resource.metadata.name}"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": object_metadata(resource, name, {**labels, **marks}),
        "spec": {
            "selector": dict(selector),
            "ports": [{"name": "system", "port": 9090, "protocol": "TCP", "targetPort": 9090}],
        },
    }


POD_READER: tuple[Object, ...] = ({"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},)
DYNAMO_DISCOVERY: tuple[Object, ...] = (
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
    {
        "apiGroups": ["nvidia.com"],
        "resources": ["dynamoworkermetadatas"],
        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
    },
)


def permissions(resource: Resource, name: str, rules: Sequence[Object]) -> tuple[Object, ...]:
    """A ServiceAccount with one Role, owned by the application: Arks shared one set per namespace and left it."""
    meta = object_metadata(resource, name, {**MANAGED_BY})
    return (
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": meta, "rules": [dict(rule) for rule in rules]},
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": resource.metadata.namespace}],
        },
    )
