"""What the controller may do in the API, and why: one table, the ClusterRole and the Role are generated from it.

`python -m controller.permissions > manifests/base/rbac.yaml` writes them. Code that calls the API for something new
adds a row here; the tests try every verb on every kind against a real API server and expect exactly this table.

Objects are written by server-side apply, which asks for `patch`, and for `create` where there is none yet.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import yaml

NAMESPACE = "arks-system"
SERVICE_ACCOUNT = "arks-controller"

READ = ("get", "list", "watch")
OWN = ("create", "delete", "get", "list", "patch", "watch")


@dataclass(frozen=True, slots=True)
class Permission:
    """`namespace`: only there; empty for the whole cluster, because tenants have their own namespaces."""

    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    why: str
    namespace: str = ""


_WITH_FINALIZERS = ("arksapplications", "arksdisaggregatedapplications", "arksendpoints", "arksmodels")
_KINDS = (*_WITH_FINALIZERS, "arksquotas", "arkstokens")

PERMISSIONS = (
    Permission("arks.ai", _KINDS, READ, "what users ask for"),
    Permission("arks.ai", tuple(f"{kind}/status" for kind in _KINDS), ("patch",), "phases, conditions, use of quotas"),
    Permission("arks.ai", _WITH_FINALIZERS, ("patch",), "taking off the finalizers that Arks' operator left"),
    Permission(
        "arks.ai",
        tuple(f"{kind}/finalizers" for kind in _WITH_FINALIZERS),
        ("update",),
        "owner references that hold back deletion, where the cluster checks them",
    ),
    Permission("", ("services", "persistentvolumeclaims", "serviceaccounts"), OWN, "runtimes and model storage"),
    Permission("apps", ("deployments",), OWN, "runtimes of one pod, routers"),
    Permission("batch", ("jobs",), OWN, "model downloads"),
    Permission("leaderworkerset.x-k8s.io", ("leaderworkersets",), OWN, "runtimes of several pods"),
    Permission(
        "workloads.x-k8s.io", ("rolebasedgroups", "rolebasedgroupsets"), OWN, "runtimes in groups; Arks' sets of them"
    ),
    Permission("gateway.networking.k8s.io", ("httproutes",), OWN, "an endpoint's route"),
    Permission("rbac.authorization.k8s.io", ("roles", "rolebindings"), OWN, "routers find pods, Dynamo its workers"),
    Permission("nvidia.com", ("dynamoworkermetadatas",), (*OWN, "update"), "given on to Dynamo's workers, not used"),
    Permission("", ("pods",), READ, "which engines are ready, at which address"),
    Permission("", ("pods/log",), ("get",), "how far a download is"),
    Permission("", ("nodes",), READ, "where a model is to be preloaded"),
    Permission("", ("secrets",), READ, "tokens and download secrets, by the names that objects give; rotation is seen"),
    Permission("discovery.k8s.io", ("endpointslices",), READ, "engines behind Services that users name"),
    Permission("gateway.networking.k8s.io", ("gateways",), READ, "a condition where an endpoint's Gateway is missing"),
    Permission("gateway.envoyproxy.io", ("backends",), READ, "engines outside the cluster"),
    Permission("", ("events",), ("create",), "what happened, on transitions"),
    Permission("coordination.k8s.io", ("leases",), ("create", "get", "update"), "one replica leads", NAMESPACE),
)


def rules(namespace: str) -> list[dict[str, Any]]:
    return [
        {"apiGroups": [item.group], "resources": sorted(item.resources), "verbs": sorted(item.verbs)}
        for item in PERMISSIONS
        if item.namespace == namespace
    ]


def rbac() -> list[dict[str, Any]]:
    """ClusterRole, Role and the bindings of the controller's ServiceAccount."""
    group = "rbac.authorization.k8s.io"
    subjects = [{"kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": NAMESPACE}]
    objects = []
    for kind, namespace in (("ClusterRole", ""), ("Role", NAMESPACE)):
        meta = {"name": SERVICE_ACCOUNT, **({"namespace": namespace} if namespace else {})}
        head = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": meta}
        objects.append({**head, "rules": rules(namespace)})
        reference = {"apiGroup": group, "kind": kind, "name": SERVICE_ACCOUNT}
        objects.append({**head, "kind": f"{kind}Binding", "roleRef": reference, "subjects": subjects})
    return objects


if __name__ == "__main__":
    print("# Generated: python -m controller.permissions > manifests/base/rbac.yaml")
    # A Dumper of its own: shared lists would be written as anchors.
    dumper = type("_Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    yaml.dump_all(rbac(), sys.stdout, dumper, sort_keys=False)
