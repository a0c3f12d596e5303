"""What stands in the cluster: tenants' resources, and what nodes and other projects' controllers make of them.

Each tenant is a namespace with as many endpoints, applications and tokens as the next one, one quota, and one model
that is in its storage already. Every application runs in pods of its own, made of the very template that the
controller wrote.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.controller.cluster import Api, Call, Object, path

ARKS, CORE, DISCOVERY = "arks.ai/v1", "v1", "discovery.k8s.io/v1"
GATEWAY_API, LWS = "gateway.networking.k8s.io/v1", "leaderworkerset.x-k8s.io/v1"
GATEWAY = {"name": "arks-eg", "namespace": "arks-system"}
APPLICATION_LABEL, SERVICE_LABEL = "arks.ai/application", "kubernetes.io/service-name"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
PORT_NAME = "http"
_NOW = "2026-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Size:
    tokens: int = 10_000
    endpoints: int = 1_000
    pods: int = 2_000
    tenants: int = 50

    @property
    def replicas(self) -> int:
        """Pods of each application; each endpoint has one application."""
        return self.pods // self.endpoints

    def __str__(self) -> str:
        return f"{self.tokens} ArksTokens, {self.endpoints} ArksEndpoints, {self.pods} pods"


def tenant(number: int, size: Size) -> str:
    return f"team-{number % size.tenants}"


def secret(name: str) -> str:
    return f"sk-{name}"


def _create(api_version: str, kind: str, plural: str, namespace: str, name: str, **body: object) -> Call:
    """With the copy of itself that `kubectl apply` leaves in each object."""
    meta: Object = {"name": name, "namespace": namespace} if namespace else {"name": name}
    item: Object = {"apiVersion": api_version, "kind": kind, "metadata": meta, **body}
    meta["annotations"] = {LAST_APPLIED: json.dumps(item)}
    return Call("POST", path(api_version, plural, namespace), item)


def token(name: str, namespace: str, endpoint: str) -> Call:
    rates = [{"type": kind, "value": 1_000_000} for kind in ("rpm", "tpm", "rpd", "tpd")]
    qos = [{"arksEndpoint": {"name": endpoint}, "rateLimits": rates, "quota": {"name": "basic"}}]
    spec = {"token": secret(name), "qos": qos}
    return _create(ARKS, "ArksToken", "arkstokens", namespace, name, spec=spec)


def token_path(name: str, namespace: str) -> str:
    return path(ARKS, "arkstokens", namespace, name)


def tenants(size: Size) -> Iterator[Call]:
    """The namespaces, which must be there before the rest."""
    for number in range(size.tenants):
        yield _create(CORE, "Namespace", "namespaces", "", tenant(number, size))


def resources(size: Size) -> Iterator[Call]:
    """All that people apply."""
    yield _create(GATEWAY_API, "Gateway", "gateways", GATEWAY["namespace"], GATEWAY["name"], spec=_gateway())
    for number in range(size.tenants):
        yield from _shared(tenant(number, size))
    for number in range(size.endpoints):
        namespace, name = tenant(number, size), endpoint_name(number, size)
        spec: Object = {"defaultWeight": 1, "gatewayRef": GATEWAY}
        yield _create(ARKS, "ArksEndpoint", "arksendpoints", namespace, name, spec=spec)
        spec = _application(name, size.replicas)
        yield _create(ARKS, "ArksApplication", "arksapplications", namespace, f"app-{name}", spec=spec)
    for number in range(size.tokens):
        yield token(f"token-{number}", tenant(number, size), endpoint_name(number, size))


def endpoint_name(number: int, size: Size) -> str:
    """Of one that the tenant of that number has."""
    return f"model-{number // size.tenants % (size.endpoints // size.tenants)}"


def _gateway() -> Object:
    listener = {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}
    return {"gatewayClassName": "arks-eg", "listeners": [listener]}


def _shared(namespace: str) -> Iterator[Call]:
    quotas = [{"type": kind, "value": 10**12} for kind in ("prompt", "response", "total")]
    yield _create(ARKS, "ArksQuota", "arksquotas", namespace, "basic", spec={"quotas": quotas})
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "200Gi"}}}
    spec = {"model": "Qwen/Qwen2.5-7B-Instruct", "storage": {"pvc": {"name": "models", "spec": claim}}}
    yield _create(ARKS, "ArksModel", "arksmodels", namespace, "qwen", spec=spec)


def _application(serves: str, replicas: int) -> Object:
    gpu = {"nvidia.com/gpu": "1"}
    return {
        "replicas": replicas,
        "size": 1,
        "tensorParallelSize": 1,
        "runtime": "vllm",
        "model": {"name": "qwen"},
        "servedModelName": serves,
        "instanceSpec": {"resources": {"limits": gpu, "requests": gpu}},
    }


def followed(size: Size, policy: str) -> Iterator[Call]:
    """Another weightPolicy for all endpoints."""
    for number in range(size.endpoints):
        where = path(ARKS, "arksendpoints", tenant(number, size), endpoint_name(number, size))
        yield Call("PATCH", where, {"spec": {"weightPolicy": policy}})


class Nodes:
    """Kubelets, the controllers of LeaderWorkerSets and EndpointSlices, and a Gateway's.

    `engines`: where the pods' engines are, ip:port each. The pods of one machine share its address, so each has a port,
    and a slice, of its own.
    """

    def __init__(self, api: Api, engines: Sequence[str]) -> None:
        self._api, self._engines = api, engines

    async def act(self) -> int:
        """Bring all workloads up and answer all routes; how many pods that made."""
        services = {
            (meta["namespace"], meta["labels"][APPLICATION_LABEL]): meta["name"]
            for each in await self._api.items(path(CORE, "services"), {"labelSelector": APPLICATION_LABEL})
            if (meta := each["metadata"])
        }
        sets = await self._api.items(path(LWS, "leaderworkersets"))
        routes = await self._api.items(path(GATEWAY_API, "httproutes"))
        addresses = iter(self._engines)
        pods: list[Call] = []
        ready: list[Call] = []
        for each in sets:
            key = each["metadata"]["namespace"], each["metadata"]["labels"][APPLICATION_LABEL]
            for replica in range(each["spec"]["replicas"]):
                address = next(addresses)
                pods.append(_pod(each, replica))
                ready.append(_running(each, replica, address))
                ready.append(_slice(key[0], services[key], replica, address))
            ready.append(_rolled_out(each))
        await self._api.write(pods)
        await self._api.write([*ready, *_answered(routes)])
        return len(pods)


def _pod(owner: Object, replica: int) -> Call:
    meta, template = owner["metadata"], owner["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    labels = {
        **template["metadata"].get("labels", {}),
        "leaderworkerset.sigs.k8s.io/name": meta["name"],
        "leaderworkerset.sigs.k8s.io/group-index": str(replica),
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    reference = {"apiVersion": LWS, "kind": "LeaderWorkerSet", "name": meta["name"], "uid": meta["uid"]}
    name = f"{meta['name']}-{replica}"
    item: Object = {
        "apiVersion": CORE,
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": template["metadata"].get("annotations") or {},
            "ownerReferences": [{**reference, "controller": True}],
        },
        "spec": template["spec"],
    }
    return Call("POST", path(CORE, "pods", meta["namespace"]), item)


def _running(owner: Object, replica: int, address: str) -> Call:
    containers = owner["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"]
    ip = address.rpartition(":")[0]
    status = {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": _NOW}],
        "containerStatuses": [
            {
                "name": each["name"],
                "image": each["image"],
                "imageID": "",
                "ready": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": _NOW}},
            }
            for each in containers
        ],
    }
    meta = owner["metadata"]
    where = path(CORE, "pods", meta["namespace"], f"{meta['name']}-{replica}", "status")
    return Call("PATCH", where, {"status": status})


def _slice(namespace: str, service: str, replica: int, address: str) -> Call:
    ip, _, port = address.rpartition(":")
    name = f"{service}-{replica}"
    item = {
        "apiVersion": DISCOVERY,
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": {SERVICE_LABEL: service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [ip], "conditions": {"ready": True}}],
        "ports": [{"name": PORT_NAME, "port": int(port), "protocol": "TCP"}],
    }
    return Call("POST", path(DISCOVERY, "endpointslices", namespace), item)


def _rolled_out(owner: Object) -> Call:
    meta, count = owner["metadata"], owner["spec"]["replicas"]
    status = {"replicas": count, "readyReplicas": count, "updatedReplicas": count}
    where = path(LWS, "leaderworkersets", meta["namespace"], meta["name"], "status")
    return Call("PATCH", where, {"status": {**status, "observedGeneration": meta["generation"]}})


def _answered(routes: Iterable[Object]) -> Iterator[Call]:
    """As Envoy Gateway says that it carries them."""
    for route in routes:
        meta = route["metadata"]
        condition = {"status": "True", "message": "", "lastTransitionTime": _NOW}
        condition |= {"observedGeneration": meta["generation"]}
        conditions = [{**condition, "type": kind, "reason": kind} for kind in ("Accepted", "ResolvedRefs")]
        parents = [
            {"parentRef": reference, "controllerName": "gateway.envoyproxy.io/gatewayclass-controller"}
            | {"conditions": conditions}
            for reference in route["spec"]["parentRefs"]
        ]
        where = path(GATEWAY_API, "httproutes", meta["namespace"], meta["name"], "status")
        yield Call("PATCH", where, {"status": {"parents": parents}})
