"""Dynamo's pods on a real API server: what finds them is Dynamo itself, through what Arks applied for it.

The objects that Arks generates are applied as they are, and Kubernetes' own controllers make Deployments' pods and
EndpointSlices of Services. This module stands for the kubelet: it runs a pod's container as a program with the pod's
own ServiceAccount, and tells the API server whether it is ready. Pods listen on loopback addresses, which no Endpoint
may have, so the addresses told are others; Dynamo takes from an EndpointSlice who is ready, and not where it is.
"""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

from controller.reconcile.desired.outcome import Desired
from tests.engines_real.dynamo_pods import containers, mocked
from tests.engines_real.pod_container import PodContainer
from tests.harness.gateway import until
from tests.harness.kubernetes import KubeApi

METADATA = """
# For tests alone: a stand-in for DynamoWorkerMetadata's definition, written from what Dynamo stores in one.
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: dynamoworkermetadatas.nvidia.com}
spec:
  group: nvidia.com
  scope: Namespaced
  names: {kind: DynamoWorkerMetadata, plural: dynamoworkermetadatas, singular: dynamoworkermetadata, shortNames: [dwm]}
  versions:
    - name: v1alpha1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec: {type: object, x-kubernetes-preserve-unknown-fields: true}
"""
NODE = "dynamo-node"
_addresses = itertools.count(1)

Object = dict[str, Any]


class DynamoCluster:
    """One namespace, and what runs in it. The definition METADATA is served already."""

    def __init__(self, api: KubeApi, folder: Path, weights: Path) -> None:
        self.api, self.namespace = api, api.create_namespace("dynamo")
        self._folder, self._weights = folder, weights
        self.pods: dict[str, Object] = {}
        self.running: dict[str, PodContainer] = {}
        api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})

    def close(self) -> None:
        for each in self.running.values():
            each.kill()
        self.api.remove_namespace(self.namespace)

    # -- what a controller of Arks' does ------------------------------------------------------------------------------

    def apply(self, desired: Desired) -> None:
        for item in (*desired.objects, *desired.plan.apply):
            if item["kind"] == "LeaderWorkerSet":
                self._group(item)
            else:
                # Its owner is on no API server here, and what nobody owns is collected.
                meta = {key: value for key, value in item["metadata"].items() if key != "ownerReferences"}
                self.api.apply({**item, "metadata": meta}, namespace=self.namespace)

    def _group(self, item: Object) -> None:
        """The pods that LWS would make of groups of one."""
        template = item["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
        for number in range(item["spec"]["replicas"]):
            name = f"{item['metadata']['name']}-{number}"
            meta = {**template["metadata"], "name": name, "namespace": self.namespace}
            self.api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})

    # -- what a kubelet does ------------------------------------------------------------------------------------------

    async def start(self, count: int, *options: str) -> None:
        """The programs of all pods, once there are so many; nobody is told yet that any is ready."""
        await until(lambda: len(self._there()) == count, 60)
        for each in self._there():
            meta = each["metadata"]
            bind = {"metadata": {"name": meta["name"]}, "target": {"apiVersion": "v1", "kind": "Node", "name": NODE}}
            self.api.request("POST", f"/api/v1/namespaces/{self.namespace}/pods/{meta['name']}/binding", bind)
            self.pods[meta["name"]] = each
            self.running[meta["name"]] = self._container(each, options)
            self.running[meta["name"]].start()
        for one in self.running.values():
            await asyncio.to_thread(one.wait_started, 60.0)

    def _there(self) -> list[Object]:
        return self.api.list("v1", "Pod", self.namespace)

    def _container(self, pod: Object, options: tuple[str, ...]) -> PodContainer:
        account = pod["spec"]["serviceAccountName"]
        credentials = {"token": self.api.service_account_token(self.namespace, account)}
        config = self.api.kubeconfig(account, credentials=credentials)
        folder = self._folder / pod["metadata"]["name"]
        tree = mocked(pod, *options)
        (found,) = containers(tree, folder, {"models": self._weights}, KUBECONFIG=str(config)).values()
        return found

    def tell(self, name: str, *, ready: bool) -> None:
        """What the container's readiness probe says, as the pod's condition."""
        status = {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-01T00:00:00Z"}
        address = f"192.0.2.{next(_addresses)}"
        where = self.pods[name].setdefault("told", {"podIP": address, "podIPs": [{"ip": address}]})
        self.api.set_status(self.pods[name], phase="Running", conditions=[status], **where)

    def named(self, kind: str) -> list[str]:
        """Pods whose command holds this module."""
        return sorted(name for name, one in self.running.items() if kind in one.command)

    async def stop(self, name: str) -> int:
        """As a deleted pod ends; its exit status."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}"
        self.api.request("DELETE", path)
        status = await asyncio.to_thread(self.running.pop(name).stop)
        self.api.request("DELETE", path, {"gracePeriodSeconds": 0})
        return status

    # -- what Dynamo does ---------------------------------------------------------------------------------------------

    def announced(self) -> list[str]:
        """The pods that have announced themselves, with what they serve."""
        found = self.api.list("nvidia.com/v1alpha1", "DynamoWorkerMetadata", self.namespace)
        return sorted(each["metadata"]["name"] for each in found if "generate" in json.dumps(each["spec"]))
