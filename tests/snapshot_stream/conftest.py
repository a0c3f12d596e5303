"""One API server with our CRDs and Envoy Gateway's Backend, for this folder's tests on a real cluster."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.envoy_gateway import custom_resources
from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import KubeApi, Object, binaries

CRDS = Path(__file__).parents[2] / "manifests" / "crds"


class Tenant:
    """One namespace of `api`, and the documents that a tenant applies there."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.api, self.namespace = api, namespace

    def apply(
        self, api_version: str, kind: str, name: str, labels: dict[str, str] | None = None, **body: Any
    ) -> Object:
        meta = {"name": name, "namespace": self.namespace, "labels": labels or {}}
        return self.api.apply({"apiVersion": api_version, "kind": kind, "metadata": meta, **body})[0]

    def token(self, name: str, secret: str = "", *, endpoint: str = "qwen", **spec: Any) -> Object:
        held = {"token": secret} if secret else {}
        qos = [{"arksEndpoint": {"name": endpoint}}]
        return self.apply("arks.ai/v1", "ArksToken", name, spec={**held, "qos": qos, **spec})

    def endpoint(self, name: str = "qwen", **spec: Any) -> Object:
        return self.apply("arks.ai/v1", "ArksEndpoint", name, spec={"gatewayRef": {"name": "eg"}, **spec})

    def secret(self, name: str, **values: str) -> Object:
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        return self.apply("v1", "Secret", name, data=data)

    def service(self, name: str, port: int = 8080) -> Object:
        return self.apply("v1", "Service", name, spec={"ports": [{"name": "http", "port": port}]})

    def slice(self, service: str, *ready: str, port: int = 8080, unready: tuple[str, ...] = ()) -> Object:
        """An EndpointSlice; without addresses its `endpoints` is null, as the API server writes it."""
        ends = [{"addresses": [each], "conditions": {"ready": True}} for each in ready]
        ends += [{"addresses": [each], "conditions": {"ready": False}} for each in unready]
        return self.apply(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            f"{service}-1",
            {"kubernetes.io/service-name": service},
            addressType="IPv4",
            endpoints=ends,
            ports=[{"name": "http", "port": port}],
        )

    def application(self, name: str, serves: str, ready: int) -> Object:
        made = self.apply(
            "arks.ai/v1",
            "ArksApplication",
            name,
            spec={
                "replicas": ready,
                "runtime": "vllm",
                "model": {"name": "m"},
                "servedModelName": serves,
                "instanceSpec": {},
            },
        )
        counts = {"replicas": ready, "readyReplicas": ready, "updatedReplicas": ready}
        return self.api.set_status(made, phase="Running", **counts)

    def delete(self, kind: str, name: str, api_version: str = "arks.ai/v1") -> None:
        self.api.delete(api_version, kind, name, self.namespace)


@pytest.fixture(scope="session")
def api() -> Iterator[KubeApi]:
    try:
        binaries()
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")
    with KubeApi() as one:
        one.apply(
            CRDS, *(crd for crd in custom_resources("envoy-gateway") if crd["spec"]["names"]["kind"] == "Backend")
        )
        yield one


@pytest.fixture
def tenant(api: KubeApi) -> Iterator[Tenant]:
    name = api.create_namespace("team")
    yield Tenant(api, name)
    api.remove_namespace(name)
