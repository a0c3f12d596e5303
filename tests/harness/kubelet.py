"""A node for an `Actor`: pods run as programs in a `NetworkRoom`, each at an address of its own, and leave in order.

    kubelet = Kubelet(api, room, program, folder, mounts)
    program(pod, container, address)     the command to run for a container, or None: it is there and does nothing

What it does as the real one: binds the pod to its node; starts sidecars, then containers, with the environment that
their spec gives them; asks the readiness probe, tells conditions and address; on deletion runs the pre-stop hook, sends
SIGTERM, waits for the grace period, and only then lets the pod go. Volumes are folders of the room, by `mounts` (mount
path to folder): an emptyDir is emptied for each pod, a ServiceAccount's token is a real one. Pods with the same mount
must not run at the same time. What it does not: pull images, restart containers, heed resources, probe at the pace
asked for (it is in a hurry).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.harness.kubernetes import KubeApi, KubeError, Object
from tests.harness.room import NetworkRoom, Resident

NODE = "node-1"
PERIOD_S = 0.2
FAILURE_THRESHOLD = 3
"""of a probe that names none"""
EPOCH = "2026-01-01T00:00:00Z"

_log = logging.getLogger("kubelet")

Program = Callable[[Object, Object, str], list[str] | None]


@dataclass
class _Container:
    spec: Object
    process: Resident | None
    probe: aiohttp.ClientSession | None = None
    path: str = ""
    was_ready: bool = False
    failures: int = 0


@dataclass
class _Life:
    """One pod, from its first sight to its end."""

    task: asyncio.Task[None] | None = None
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    grace_s: float = 30.0


class Kubelet:
    def __init__(
        self,
        api: KubeApi,
        room: NetworkRoom,
        program: Program,
        folder: Path,
        mounts: Mapping[str, Path] | None = None,
    ) -> None:
        """`folder` gets the containers' logs, named by pod and container."""
        self._api, self._room, self._program, self._folder = api, room, program, folder
        self._mounts = dict(mounts or {})
        network = room.address.rpartition(".")[0]
        self._addresses = (f"{network}.{number}" for number in itertools.count(10))
        self._lives: dict[str, _Life] = {}
        folder.mkdir(parents=True, exist_ok=True)
        api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})

    def see(self, pods: Iterable[Object]) -> None:
        """All pods there are. The loop that calls this is where they live."""
        there = {pod["metadata"]["uid"]: pod for pod in pods}
        for uid, pod in there.items():
            life = self._lives.get(uid)
            if life is None:
                life = self._lives[uid] = _Life()
                life.task = asyncio.create_task(self._live(pod, life), name=f"pod {pod['metadata']['name']}")
            if pod["metadata"].get("deletionTimestamp"):
                life.grace_s = pod["metadata"].get("deletionGracePeriodSeconds", 0)
                life.leaving.set()
        for uid in self._lives.keys() - there.keys():
            life = self._lives.pop(uid)
            assert life.task is not None
            life.task.cancel()

    async def close(self) -> None:
        """End all that runs, at once."""
        tasks = [life.task for life in self._lives.values() if life.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one pod ------------------------------------------------------------------------------------------------------

    async def _live(self, pod: Object, life: _Life) -> None:
        meta, spec = pod["metadata"], pod["spec"]
        containers: list[_Container] = []
        try:
            if not life.leaving.is_set():
                if "nodeName" not in spec:
                    await self._bind(meta)
                address = next(self._addresses)
                self._fill_volumes(pod)
                sidecars = [each for each in spec.get("initContainers", ()) if each.get("restartPolicy") == "Always"]
                for each in (*sidecars, *spec["containers"]):
                    started = await asyncio.to_thread(self._start, pod, each, address)
                    containers.append(started)
                await self._until_leaving(pod, life, containers, address)
                # Sidecars outlive what they serve.
                for each in reversed(containers):
                    await self._stop(each, time.monotonic() + life.grace_s)
            with contextlib.suppress(KubeError):
                await asyncio.to_thread(self._api.delete, "v1", "Pod", meta["name"], meta["namespace"])
        except Exception:
            _log.exception("pod %s/%s", meta["namespace"], meta["name"])
        finally:
            for each in containers:
                if each.probe is not None:
                    await each.probe.close()
                if each.process is not None and each.process.exit_code is None:
                    each.process.signal(signal.SIGKILL)

    async def _bind(self, meta: Object) -> None:
        body = {"metadata": {"name": meta["name"]}, "target": {"apiVersion": "v1", "kind": "Node", "name": NODE}}
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/binding"
        with contextlib.suppress(KubeError):  # it went meanwhile
            await asyncio.to_thread(self._api.request, "POST", path, body)

    async def _until_leaving(self, pod: Object, life: _Life, containers: list[_Container], address: str) -> None:
        told: bool | None = None
        while not life.leaving.is_set():
            ready = all([await self._serves(each) for each in containers])
            if ready != told:
                with contextlib.suppress(KubeError):
                    await asyncio.to_thread(self._tell, pod, address, ready=ready)
                    told = ready
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S):
                    await life.leaving.wait()

    def _tell(self, pod: Object, address: str, *, ready: bool) -> None:
        conditions = [
            {"type": kind, "status": str(ready), "lastTransitionTime": EPOCH} for kind in ("Ready", "ContainersReady")
        ]
        states = [
            {
                "name": each["name"],
                "image": each["image"],
                "imageID": "",
                "ready": ready,
                "restartCount": 0,
                "state": {"running": {"startedAt": EPOCH}},
            }
            for each in pod["spec"]["containers"]
        ]
        # The server fills in the list of addresses by itself, and refuses a first one that is another.
        where = {"podIP": address, "podIPs": [{"ip": address}]}
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"]}
        self._api.set_status(item, phase="Running", conditions=conditions, containerStatuses=states, **where)

    # -- one container ------------------------------------------------------------------------------------------------

    def _start(self, pod: Object, container: Object, address: str) -> _Container:
        command = self._program(pod, container, address)
        if command is None:
            return _Container(container, None)
        log = self._folder / f"{pod['metadata']['name']}-{container['name']}.log"
        started = _Container(container, self._room.spawn(command, log, self._environ(pod, container, address)))
        asked = container.get("readinessProbe", {}).get("httpGet")
        if asked is not None:
            socket = self._room.reach(address, _port(container, asked["port"]))
            started.path = f"{socket}:{asked['path']}"
        return started

    async def _serves(self, container: _Container) -> bool:
        """A container that was ready is so until its probe has failed several times in a row: a slow answer is none."""
        if await self._ready(container):
            container.failures = 0
        else:
            container.failures += 1
        allowed = container.spec.get("readinessProbe", {}).get("failureThreshold", FAILURE_THRESHOLD)
        container.was_ready = not container.failures or (container.was_ready and container.failures < allowed)
        return container.was_ready

    async def _ready(self, container: _Container) -> bool:
        if container.process is None:
            return True
        if not container.path:
            return container.process.exit_code is None
        socket, _, path = container.path.rpartition(":")
        if container.probe is None:
            connector = aiohttp.UnixConnector(socket, force_close=True)
            container.probe = aiohttp.ClientSession(
                "http://probe", connector=connector, timeout=aiohttp.ClientTimeout(total=5)
            )
        try:
            async with container.probe.get(path) as answer:
                return 200 <= answer.status < 400
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _stop(self, container: _Container, end_s: float) -> None:
        process = container.process
        if process is None:
            return
        hook = container.spec.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook is not None:
            await _ended(await asyncio.to_thread(self._room.spawn, hook["command"], process.log), end_s)
        if process.exit_code is None:
            process.signal(signal.SIGTERM)
        if not await _ended(process, end_s):
            process.signal(signal.SIGKILL)
            await _ended(process, time.monotonic() + 10)

    def _environ(self, pod: Object, container: Object, address: str) -> dict[str, str]:
        fields = {
            "metadata.name": pod["metadata"]["name"],
            "metadata.namespace": pod["metadata"]["namespace"],
            "status.podIP": address,
        }
        found = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._api.port)}
        for each in container.get("env", ()):
            reference = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            value = fields.get(reference, "") if "valueFrom" in each else each.get("value", "")
            # Pods share the room's network, so every address there is to listen on is the pod's.
            found[each["name"]] = value.replace("0.0.0.0:", f"{address}:")
        return found

    # -- volumes ------------------------------------------------------------------------------------------------------

    def _fill_volumes(self, pod: Object) -> None:
        spec = pod["spec"]
        containers = (*spec.get("initContainers", ()), *spec["containers"])
        paths = {each["name"]: each["mountPath"] for item in containers for each in item.get("volumeMounts", ())}
        for volume in spec.get("volumes", ()):
            folder = self._mounts.get(paths.get(volume["name"], ""))
            if folder is None:
                continue
            if "persistentVolumeClaim" not in volume:
                for entry in folder.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for source in volume.get("projected", {}).get("sources", ()):
                self._project(pod, source, folder)

    def _project(self, pod: Object, source: Object, folder: Path) -> None:
        namespace = pod["metadata"]["namespace"]
        if "serviceAccountToken" in source:
            token = self._api.service_account_token(namespace, pod["spec"]["serviceAccountName"])
            _write(folder / source["serviceAccountToken"]["path"], token)
        for item in source.get("configMap", {}).get("items", ()):
            assert source["configMap"]["name"] == "kube-root-ca.crt", "the only one that every namespace has"
            _write(folder / item["path"], self._api.ca_file.read_text())
        for item in source.get("downwardAPI", {}).get("items", ()):
            assert item["fieldRef"]["fieldPath"] == "metadata.namespace"
            _write(folder / item["path"], namespace)


def _write(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


def _port(container: Object, port: str | int) -> int:
    if isinstance(port, int):
        return port
    found: int = next(each["containerPort"] for each in container["ports"] if each["name"] == port)
    return found


async def _ended(process: Resident, end_s: float) -> bool:
    while await asyncio.to_thread(lambda: process.exit_code) is None:
        if time.monotonic() > end_s:
            return False
        await asyncio.sleep(0.05)
    return True
