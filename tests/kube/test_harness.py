"""The API server of the tests behaves as its description promises."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.harness.kubernetes import CONTROLLER_USER, KubeApi, KubeError

CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: pears.harness.test}
spec:
  group: harness.test
  scope: Namespaced
  names: {plural: pears, singular: pear, kind: Pear}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, x-kubernetes-preserve-unknown-fields: true}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
---
apiVersion: harness.test/v1
kind: Pear
metadata: {name: one, finalizers: [harness.test/stay]}
spec: {ripe: true}
"""


def test_a_crd_and_its_object_apply_in_one_go_and_a_stuck_namespace_goes_away(kube_api: KubeApi) -> None:
    namespace = kube_api.create_namespace()
    _, pear = kube_api.apply(CRD, namespace=namespace)
    assert pear["metadata"]["namespace"] == namespace
    assert kube_api.set_status(pear, phase="Ripe")["status"] == {"phase": "Ripe"}
    kube_api.remove_namespace(namespace)
    with pytest.raises(KubeError, match="404"):
        kube_api.get("v1", "Namespace", namespace)
    assert kube_api.list("harness.test/v1", "Pear") == []


def test_rights_are_what_rbac_grants(kube_api: KubeApi, kube_namespace: str) -> None:
    with pytest.raises(KubeError, match="403") as refused:
        kube_api.list("v1", "Secret", kube_namespace, user="controller")
    assert CONTROLLER_USER in str(refused.value)
    kube_api.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "sa", "namespace": kube_namespace}}
    )
    token = kube_api.service_account_token(kube_namespace, "sa")
    with pytest.raises(KubeError, match=f"403.*{kube_namespace}:sa"):
        kube_api.request("GET", "/api/v1/secrets", token=token)


def test_a_restart_keeps_the_data_and_rotates_tokens(own_kube_api: KubeApi) -> None:
    own_kube_api.create_namespace("kept")
    old = own_kube_api.token()
    own_kube_api.restart(token_overrides={"admin": "another"})
    assert any(each["metadata"]["name"].startswith("kept") for each in own_kube_api.list("v1", "Namespace"))
    with pytest.raises(KubeError, match="401"):
        own_kube_api.request("GET", "/api", token=old)


def test_the_controllers_of_kubernetes_do_what_they_do(kube_cluster: KubeApi) -> None:
    namespace = kube_cluster.create_namespace()
    labels = {"app": "x"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    kube_cluster.apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec}, namespace=namespace
    )
    eventually(lambda: len(kube_cluster.list("v1", "Pod", namespace)) == 2)
    for pod in kube_cluster.list("v1", "Pod", namespace):
        kube_cluster.set_status(pod, phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    eventually(lambda: kube_cluster.get("apps/v1", "Deployment", "d", namespace)["status"].get("readyReplicas") == 2)
    kube_cluster.delete("apps/v1", "Deployment", "d", namespace)
    eventually(lambda: not kube_cluster.list("v1", "Pod", namespace))
    kube_cluster.remove_namespace(namespace)


def eventually(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "never became true"
        time.sleep(0.05)
