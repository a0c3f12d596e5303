"""A cluster that serves: Kubernetes' own controllers, a node, Envoy Gateway with a real Envoy, and what our manifests
make run there, as its pod says.

The Deployment `arks` becomes a pod whose two containers are processes with the arguments, environment and volumes of
the manifest, the controller with a real token of its ServiceAccount. An application's leader becomes a simulated engine
that hears what its command line says; whoever asks it learns its pod's name as the answer's `model`. Downloads are
finished by the `Actor`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import aiohttp

from tests.harness.actor import LWS, RBG, Actor, in_a_thread
from tests.harness.envoy_gateway import EnvoyGateway, on_this_host
from tests.harness.gateway import Gateway
from tests.harness.kube_proxy import KubeProxy
from tests.harness.kubelet import Kubelet
from tests.harness.kubernetes import CONTROLLERS, KubeApi, Object
from tests.harness.rights import until_granted
from tests.reconcile.conftest import Room

STAND_INS = Path(__file__).parents[1] / "harness" / "crds"
GATEWAY_API = "gateway.networking.k8s.io/v1"
ENVOY_API = "gateway.envoyproxy.io/v1alpha1"
JUDGED = (
    (GATEWAY_API, "GatewayClass"),
    (GATEWAY_API, "Gateway"),
    (GATEWAY_API, "HTTPRoute"),
    (ENVOY_API, "ClientTrafficPolicy"),
    (ENVOY_API, "BackendTrafficPolicy"),
    (ENVOY_API, "EnvoyExtensionPolicy"),
)
MOUNTS = {
    "/run/arks": "run",
    "/var/lib/arks": "state",
    "/var/run/secrets/kubernetes.io/serviceaccount": "account",
}


class Platform:
    """`with Platform(folder) as platform: platform.install(objects)`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mounts = {path: folder / name for path, name in MOUNTS.items()}
        self._loading = folder / "loading"
        self._stack = contextlib.ExitStack()
        self.api: KubeApi
        self.gateway: EnvoyGateway
        self.actor: Actor
        self.entrance: Path

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.api = stack.enter_context(KubeApi(controllers=CONTROLLERS))
            for folder in self._mounts.values():
                folder.mkdir(parents=True)
            self.api.apply(STAND_INS)
            self.gateway = stack.enter_context(EnvoyGateway(self.api, self._folder / "gateway", folders=self._mounts))
            kubelet = Kubelet(self.api, self.gateway.room, self._program, self._folder / "pods", self._mounts)
            proxy = KubeProxy(self.gateway.room)
            self.actor = Actor(self.api, "", kinds=(LWS, RBG), kubelet=kubelet, proxy=proxy)
            stack.enter_context(in_a_thread(self.actor))
            self.entrance = self.gateway.entrance(80)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def install(self, product: list[Object]) -> None:
        """`kubectl apply --server-side -k manifests/`; harmless when done twice."""
        objects = [on_this_host(item) if item["kind"] == "EnvoyProxy" else item for item in product]
        # The rights are in force before there is a pod that needs them: no refusal is of the first second.
        self.api.apply(*(item for item in objects if item["kind"] != "Deployment"))
        until_granted(self.api, "controller")
        self.api.apply(*(item for item in objects if item["kind"] == "Deployment"))

    @property
    def ledger(self) -> Gateway:
        """Only what reads the ledger's file."""
        state = self._mounts["/var/lib/arks"]
        return Gateway("", "", state, state, None, state)  # type: ignore[arg-type]

    async def metrics(self, pod: Object, port: int) -> str:
        """What a pod's port says of itself."""
        connector = aiohttp.UnixConnector(str(self.gateway.room.reach(pod["status"]["podIP"], port)))
        async with (
            aiohttp.ClientSession("http://pod", connector=connector) as session,
            session.get("/metrics") as answer,
        ):
            return await answer.text()

    def room(self, namespace: str) -> Room:
        return Room(self.api, namespace)

    def session(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(str(self.entrance))
        return aiohttp.ClientSession("http://gateway", connector=connector, timeout=aiohttp.ClientTimeout(total=30))

    @contextlib.contextmanager
    def engines_load(self) -> Iterator[None]:
        """Engines that start now are not ready before the end of this."""
        self._loading.touch()
        try:
            yield
        finally:
            self._loading.unlink()

    def _program(self, pod: Object, container: Object, address: str) -> list[str] | None:
        """What runs for a container, the image's entry point included."""
        python = [sys.executable, "-m"]
        if container["image"].startswith("arks:"):
            return [*python, "arks", *container["args"]]
        command = container.get("command", [])
        if command[:1] != ["vllm"] or "--headless" in command:
            return None
        names = ["--model", pod["metadata"]["name"], "--model", _option(command, "--served-model-name")]
        listen = ["--listen", f"{address}:{_option(command, '--port')}"]
        drain = ["--shutdown-timeout-s", _option(command, "--shutdown-timeout")]
        engine = [*python, "simengine", *names, *listen, *drain, "--itl-ms", "20", "--allow-fault-headers"]
        return ["sh", "-c", 'while [ -e "$0" ]; do sleep 0.05; done; exec "$@"', str(self._loading), *engine]


def _option(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]
