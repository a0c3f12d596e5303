"""Downloads as a node runs them: the very command of the Job's pod as a process here, its log where a kubelet has it.

async with LoaderPods(api, namespace, folder) as pods:
    pods.volume             what the loaders see as their models' mount
    pods.environment        more variables, for loaders that start from now on
    pods.started            each loader that ran: its argument as the Job gave it, and the pod's own variables
    pods.log_requests       names of pods whose log was asked for

There is no container: the mount's path in the argument is replaced by the volume's. Jobs and their pods are made by the
real kube-controller-manager, and `pods/log` goes through the real API server to here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import ssl
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from aiohttp import web

from controller.engines.model import MODELS_MOUNT
from controller.kube.client import Client, decoder
from controller.kube.credentials import from_kubeconfig
from controller.kube.errors import ConflictError, NotFoundError
from controller.kube.reflector import Reflector
from controller.kube.resource import PODS, Key
from tests.harness.kubernetes import KubeApi, KubeError, Object

ROOT = Path(__file__).parents[2]
JOB_LABEL = "batch.kubernetes.io/job-name"
EPOCH = "2026-01-01T00:00:00Z"
MESSAGE_LIMIT_BYTES = 4096
FALLBACK_BYTES, FALLBACK_LINES = 2048, 80


class Started(NamedTuple):
    argument: Any
    environment: dict[str, str]


class LoaderPods:
    def __init__(self, api: KubeApi, namespace: str, folder: Path) -> None:
        self.volume = folder / "volume"
        self.volume.mkdir()
        self.environment: dict[str, str] = {}
        self.started: list[Started] = []
        self.log_requests: list[str] = []
        self._api, self._namespace, self._folder = api, namespace, folder
        self._node = f"node-{namespace}"
        self._pods: dict[str, asyncio.Task[None]] = {}
        self._logs: dict[str, Path] = {}
        self._client = Client(from_kubeconfig(str(api.kubeconfig())), field_manager="kubelet")
        self._seen = Reflector(
            self._client,
            PODS,
            decoder(dict[str, Any]),
            namespace=namespace,
            label_selector=JOB_LABEL,
            on_change=self._changed,
        )

    async def __aenter__(self) -> Self:
        await self._serve_logs()
        await asyncio.to_thread(self._make_node)
        await self._client.__aenter__()
        self._watching = asyncio.create_task(self._seen.run())
        await self._seen.synced.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._watching, *self._pods.values()]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.__aexit__()
        await self._runner.cleanup()
        await asyncio.to_thread(self._api.delete, "v1", "Node", self._node)
        await asyncio.sleep(0.05)  # TLS connections of broken-off watches say good-bye
        for end in ends:
            if isinstance(end, Exception):
                raise end

    # -- the node -----------------------------------------------------------------------------------------------------

    async def _serve_logs(self) -> None:
        """The part of a kubelet's API that an API server's `pods/log` comes to."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._api.folder / "apiserver.crt", self._api.folder / "apiserver.key")
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/worker", self._log)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]

    def _make_node(self) -> None:
        (node,) = self._api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._node}})
        addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
        self._api.set_status(node, addresses=addresses, daemonEndpoints={"kubeletEndpoint": {"Port": self._port}})

    async def _log(self, request: web.Request) -> web.Response:
        pod = request.match_info["pod"]
        self.log_requests.append(pod)
        log = self._logs.get(pod)
        if log is None:
            return web.Response(status=400, text="the container is waiting to start")
        lines = log.read_bytes().splitlines(keepends=True)
        tail = b"".join(lines[-int(request.query["tailLines"]) :])
        return web.Response(body=tail[: int(request.query["limitBytes"])], content_type="text/plain")

    # -- its pods -----------------------------------------------------------------------------------------------------

    def _changed(self, key: Key, new: Object | None, _old: Object | None) -> None:
        """One task per pod, from its making to its end."""
        if new is not None and new["metadata"].get("deletionTimestamp"):
            if key.name in self._pods:
                self._pods[key.name].cancel()
        elif new is not None and key.name not in self._pods:
            self._pods[key.name] = asyncio.create_task(self._life(new))

    async def _life(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        try:
            await asyncio.to_thread(self._bind, name)
            while True:
                environment, missing = await asyncio.to_thread(self._environment_of, pod)
                if not missing:
                    break
                state = {"waiting": {"reason": "CreateContainerConfigError", "message": missing}}
                await self._status(name, "Pending", state)
                await asyncio.sleep(0.2)  # a kubelet looks again, too
            await self._load(pod, environment)
        except asyncio.CancelledError:
            # Told to go, as a node does; what the API server still shows of it goes last.
            with contextlib.suppress(NotFoundError):
                await asyncio.shield(self._client.delete(PODS, name, self._namespace, grace_s=0))
            raise

    def _bind(self, name: str) -> None:
        path = f"/api/v1/namespaces/{self._namespace}/pods/{name}/binding"
        target = {"apiVersion": "v1", "kind": "Node", "name": self._node}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        with contextlib.suppress(KubeError):  # gone already
            self._api.request("POST", path, body)

    async def _status(self, name: str, phase: str, state: Object) -> None:
        container = {"name": "worker", "image": "x", "imageID": "", "restartCount": 0, "state": state}
        status = {"phase": phase, "containerStatuses": [{**container, "ready": "running" in state}]}
        with contextlib.suppress(NotFoundError, ConflictError):
            await self._client.patch(PODS, name, self._namespace, {"status": status}, subresource="status")

    def _environment_of(self, pod: Object) -> tuple[dict[str, str], str]:
        """(the container's variables, what is missing for them)"""
        found: dict[str, str] = {}
        for each in pod["spec"]["containers"][0]["env"]:
            if "value" in each:
                found[each["name"]] = each["value"]
                continue
            key = each["valueFrom"]["secretKeyRef"]
            try:
                data = self._api.get("v1", "Secret", key["name"], self._namespace).get("data", {})
            except KubeError:
                data = {}
            if key["key"] in data:
                found[each["name"]] = base64.b64decode(data[key["key"]]).decode()
            elif not key.get("optional"):
                return {}, f"couldn't find key {key['key']} in Secret {self._namespace}/{key['name']}"
        return found, ""

    async def _load(self, pod: Object, environment: dict[str, str]) -> None:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        assert container["command"][0] == "python3"
        argument = json.loads(container["args"][0])
        self.started.append(Started(json.loads(container["args"][0]), environment))
        argument["path"] = argument["path"].replace(MODELS_MOUNT, str(self.volume), 1)
        termination = self._folder / f"{name}.termination"
        termination.touch()
        settings = {
            "PATH": os.environ["PATH"],
            "ARKS_MODELS_MOUNT": str(self.volume),
            "ARKS_TERMINATION_LOG": str(termination),
            "ARKS_LOADER_REPORT_S": "0.1",
            "ARKS_LOADER_BACKOFF_S": "0.01",
            "ARKS_LOADER_MARGIN_BYTES": "0",
        }
        log = self._folder / f"{name}.log"
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *container["command"][1:], json.dumps(argument)),
                cwd=ROOT,
                env=settings | self.environment | environment,
                stdout=out,
                stderr=out,
            )
        self._logs[name] = log
        try:
            await self._status(name, "Running", {"running": {"startedAt": EPOCH}})
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        ended = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": _last_words(termination, log, code),
            "startedAt": EPOCH,
            "finishedAt": EPOCH,
        }
        await self._status(name, "Failed" if code else "Succeeded", {"terminated": ended})


def _last_words(termination: Path, log: Path, code: int) -> str:
    """As a kubelet does for `terminationMessagePolicy: FallbackToLogsOnError`."""
    said = termination.read_bytes()[:MESSAGE_LIMIT_BYTES]
    if not said and code:
        said = b"".join(log.read_bytes().splitlines(keepends=True)[-FALLBACK_LINES:])[-FALLBACK_BYTES:]
    return said.decode(errors="replace")
