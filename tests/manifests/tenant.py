"""A tenant of the platform: one public model, `chat`, with the applications `left` and `right` behind it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from controller.engines.model import SERVING_PORT
from controller.reconcile.desired.service import service_name
from tests.harness.kubernetes import Object
from tests.manifests.platform import Platform
from tests.reconcile.conftest import Room

TENANT = "team-a"
MODEL = "chat"
LEFT, RIGHT = "left", "right"
GATEWAY = {"name": "arks-eg", "namespace": "arks-operator-system"}
READY_TIMEOUT_S = 120.0


def application(name: str, serves: str, replicas: int = 1) -> Object:
    # Of the 16 s a pod waits 4 until everybody has heard that it leaves, and finishes its streams in the next 8.
    instance = {"terminationGracePeriodSeconds": 16}
    spec = {"replicas": replicas, "runtime": "vllm", "model": {"name": "weights"}, "servedModelName": serves}
    return document("ArksApplication", name, {**spec, "instanceSpec": instance})


def endpoint(name: str, **spec: Any) -> Object:
    """Its applications weigh as much as they have replicas."""
    return document(
        "ArksEndpoint", name, {"defaultWeight": 1, "weightPolicy": "capacity", "gatewayRef": GATEWAY, **spec}
    )


def token(name: str, *models: str, **spec: Any) -> Object:
    qos = [{"arksEndpoint": {"name": each}} for each in models]
    return document("ArksToken", name, {"token": secret_of(name), "qos": qos, **spec})


def secret_of(token: str) -> str:
    return f"sk-{token}"


def route(app: str, weight: int) -> Object:
    """One of an endpoint's routeConfigs."""
    return {"name": service_name(app), "port": SERVING_PORT, "weight": weight}


def document(kind: str, name: str, spec: Object) -> Object:
    return {"apiVersion": "arks.ai/v1", "kind": kind, "metadata": {"name": name, "namespace": TENANT}, "spec": spec}


class Tenant:
    def __init__(self, platform: Platform, namespace: str) -> None:
        self.platform, self.room = platform, Room(platform.api, namespace)

    async def settle_in(self) -> None:
        api, room = self.platform.api, self.room
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": room.namespace}})
        storage = {"pvc": {"spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}}}
        weights = document("ArksModel", "weights", {"model": "org/weights", "storage": storage})
        room.apply(weights, application(LEFT, MODEL), application(RIGHT, MODEL), endpoint(MODEL), token("rich", MODEL))
        for app in (LEFT, RIGHT):
            await room.phase("ArksApplication", app, "Running")
        await self.until_served(MODEL)

    async def until_served(self, model: str, secret: str = secret_of("rich")) -> None:
        """Ask until there is an answer: Envoy hears of a route after the API server does."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {secret}"}
        deadline = time.monotonic() + READY_TIMEOUT_S
        told = ""
        async with self.platform.session() as session:
            while time.monotonic() < deadline:
                try:
                    async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
                        told = f"{answer.status} {await answer.text()}"
                        if answer.status == 200:
                            return
                except aiohttp.ClientError as error:
                    told = repr(error)
                await asyncio.sleep(0.05)
        raise AssertionError(f"{model} is not served: {told}")

    def pods(self, app: str) -> dict[str, Object]:
        """Those that answer, by name."""
        found = self.platform.api.list("v1", "Pod", self.room.namespace)
        marks = {"arks.ai/application": app, "arks.ai/work-load-role": "leader"}
        return {
            pod["metadata"]["name"]: pod for pod in found if marks.items() <= pod["metadata"].get("labels", {}).items()
        }
