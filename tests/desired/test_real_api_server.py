"""A real API server takes what we make, every field known to it: strict validation, nothing stored.

Kinds of other projects (LeaderWorkerSet, RoleBasedGroup, HTTPRoute) are left to the tests that install their CRDs.
"""

from __future__ import annotations

import pytest
import yaml

from tests.desired.cases import GOLDEN, expected_path
from tests.harness.kubernetes import KubeApi

OWN_GROUPS = {"v1", "apps/v1", "batch/v1", "rbac.authorization.k8s.io/v1"}
SOURCES = sorted(GOLDEN.glob("*.in.yaml"))


def core_objects(source):
    documents = yaml.safe_load_all(expected_path(source).read_text(encoding="utf-8"))
    return [item for item in documents if item and item["apiVersion"] in OWN_GROUPS]


@pytest.mark.parametrize("source", SOURCES, ids=[item.name for item in SOURCES])
def test_the_api_server_accepts_each_object_strictly(kube_api: KubeApi, kube_namespace: str, source):
    for item in core_objects(source):
        item["metadata"]["namespace"] = kube_namespace
        path = kube_api.path(item["apiVersion"], item["kind"], kube_namespace)
        query = "fieldManager=arks&force=true&fieldValidation=Strict&dryRun=All"
        made = kube_api.request(
            "PATCH", f"{path}/{item['metadata']['name']}?{query}", item, content_type="application/apply-patch+yaml"
        )
        assert made["metadata"]["name"] == item["metadata"]["name"]
