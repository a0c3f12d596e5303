"""What a cluster's nodes and other controllers would do, small enough to be read, in one namespace ("": in all).

A kubelet: pods become ready and get an address; a download's pod succeeds; deleted claims go. The controllers of
LeaderWorkerSet and RoleBasedGroup: their objects get pods, labelled as theirs are, and a status; a changed template
replaces the pods. A Gateway's controller: routes are answered. Deployments, Jobs, owner references and EndpointSlices
are left to the real kube-controller-manager of `kube_cluster`.

async with Actor(api, namespace) as actor:
    actor.serving = lambda pod: False     which pods become, or stay, ready; `await actor.again()` after a change
    actor.loader = "succeed" | "fail" | "hold"
    actor.message = "..."                 termination message of a download's pod
    actor.gateways = False                no answers to routes

With a `Kubelet`, pods are no longer ready because we say so: they run, and leave as they do on a node. With a
`KubeProxy`, Services' own addresses lead to them.

with in_a_thread(actor):                  it acts whatever the caller's thread is doing; after a change `actor.wake()`
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

from controller.kube.client import Client, decoder
from controller.kube.credentials import from_kubeconfig
from controller.kube.errors import AlreadyExistsError, KubeError, NotFoundError
from controller.kube.reflector import Reflector
from controller.kube.resource import PERSISTENT_VOLUME_CLAIMS, PODS, SERVICES, Key, Resource
from controller.kube.store import Store
from tests.harness.hearing import behind
from tests.harness.kube_proxy import KubeProxy
from tests.harness.kubelet import Kubelet
from tests.harness.kubernetes import KubeApi, Object

LWS = Resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet")
RBG = Resource("workloads.x-k8s.io", "v1alpha2", "rolebasedgroups", "RoleBasedGroup")
SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
ROUTES = Resource("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute")
JOB_LABEL = "batch.kubernetes.io/job-name"
INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
REVISION = "test/revision"
EPOCH = "2026-01-01T00:00:00Z"


class Actor:
    acting: ClassVar[set[Actor]] = set()
    """all that act now"""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        *,
        kinds: Iterable[Resource] = (LWS, RBG, ROUTES),
        kubelet: Kubelet | None = None,
        proxy: KubeProxy | None = None,
    ) -> None:
        self.serving: Callable[[Object], bool] = lambda _pod: True
        self.loader: Literal["succeed", "fail", "hold"] = "succeed"
        self.message = ""
        self.gateways = True
        self.api = api
        self._client = Client(from_kubeconfig(str(api.kubeconfig())), field_manager="actor")
        self._namespace = namespace
        self._node, self._proxy = kubelet, proxy
        # What runs on a node leaves in its own time; what we only pretend is gone at once.
        self._grace_s = 0 if kubelet is None else None
        self._changed = asyncio.Event()
        self._busy = True
        self._loop: asyncio.AbstractEventLoop
        self._passes = 0
        self._addresses = itertools.count(1)
        self._stores: dict[str, Store[Object]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        proxied = () if proxy is None else (SERVICES, SLICES)
        self._reflectors = [self._reflect(kind) for kind in (PODS, PERSISTENT_VOLUME_CLAIMS, *proxied, *kinds)]

    def _reflect(self, resource: Resource) -> Reflector[Object]:
        def changed(_key: Key, _new: Object | None, _old: Object | None) -> None:
            self._changed.set()

        reflector = Reflector(
            self._client, resource, decoder(dict[str, Any]), namespace=self._namespace, on_change=changed
        )
        self._stores[resource.kind] = reflector.store
        return reflector

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._client.__aenter__()
        self._tasks = [asyncio.create_task(reflector.run()) for reflector in self._reflectors]
        for reflector in self._reflectors:
            await reflector.synced.wait()
        self._tasks.append(asyncio.create_task(self._run()))
        self.acting.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.acting.discard(self)
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._node is not None:
            await self._node.close()
        await self._client.__aexit__()
        await asyncio.sleep(0.05)  # TLS connections of broken-off watches say good-bye
        for end in ends:
            if isinstance(end, Exception):
                raise end

    @property
    def up_to_date(self) -> bool:
        """Does it hear of every change? After an outage it may act seconds later than all others."""
        return not any(reflector.outage_s for reflector in self._reflectors)

    @property
    def idle(self) -> bool:
        """Has it done all that follows from what it has heard?"""
        return self.up_to_date and not self._busy and not self._changed.is_set()

    def behind(self) -> list[str]:
        """Kinds of which it has not heard everything. Not to be called on its own loop."""
        return behind(self.api, self._reflectors)

    async def again(self) -> None:
        """Look at everything once more, now."""
        seen = self._passes
        self._changed.set()
        while self._passes <= seen:  # noqa: ASYNC110 - tests only, and short
            await asyncio.sleep(0.01)

    def wake(self) -> None:
        """As `again`, from any thread and without waiting."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def _run(self) -> None:
        while True:
            self._busy = True
            self._changed.clear()
            try:
                await self._pass()
            except KubeError:  # something changed under our hands: look again
                self._changed.set()
                await asyncio.sleep(0.05)
            self._passes += 1
            self._busy = False
            await self._changed.wait()

    async def _pass(self) -> None:
        for item in self._items("LeaderWorkerSet"):
            await self._leader_worker_set(item)
        for item in self._items("RoleBasedGroup"):
            await self._group(item)
        await self._claims()
        await self._orphans()
        if self._proxy is not None:
            self._proxy.see(self._stores["Service"].values(), self._stores["EndpointSlice"].values())
        if self._node is not None:
            self._node.see([pod for pod in self._stores["Pod"].values() if not _is_loader(pod)])
        for pod in self._items("Pod"):
            if _is_loader(pod):
                await self._loader(pod)
            elif self._node is None:
                await self._kubelet(pod)
        if self.gateways:
            for route in self._items("HTTPRoute"):
                await self._gateway(route)

    def _items(self, kind: str) -> list[Object]:
        store = self._stores.get(kind)
        return [] if store is None else [x for x in store.values() if not x["metadata"].get("deletionTimestamp")]

    # -- kubelet ------------------------------------------------------------------------------------------------------

    async def _loader(self, pod: Object) -> None:
        if (pod.get("status") or {}).get("phase") in {"Succeeded", "Failed"} or self.loader == "hold":
            return
        code = 0 if self.loader == "succeed" else 3
        ended = {"exitCode": code, "message": self.message, "finishedAt": EPOCH, "startedAt": EPOCH}
        phase = "Succeeded" if code == 0 else "Failed"
        await self._pod_status(pod, {"phase": phase, "containerStatuses": [_container(pod, terminated=ended)]})

    async def _kubelet(self, pod: Object) -> None:
        status = pod.get("status") or {}
        ready = self.serving(pod)
        was = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or ())
        if status.get("phase") == "Running" and was == ready:
            return
        address = status.get("podIP") or f"10.244.0.{next(self._addresses)}"
        condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": EPOCH}
        running = _container(pod, running={"startedAt": EPOCH}, ready=ready)
        new = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        await self._pod_status(pod, {**new, "conditions": [condition], "containerStatuses": [running]})

    async def _pod_status(self, pod: Object, status: Object) -> None:
        meta = pod["metadata"]
        with contextlib.suppress(NotFoundError):
            await self._client.patch(PODS, meta["name"], meta["namespace"], {"status": status}, subresource="status")

    # -- controllers of workloads -------------------------------------------------------------------------------------

    async def _leader_worker_set(self, item: Object) -> None:
        spec, name = item["spec"], item["metadata"]["name"]
        template, size = spec["leaderWorkerTemplate"], spec["leaderWorkerTemplate"]["size"]
        revision = _digest(template)
        wanted: dict[str, Object] = {}
        for group in range(spec["replicas"]):
            for index in range(size):
                kind = "leaderTemplate" if index == 0 else "workerTemplate"
                pod = f"{name}-{group}" if index == 0 else f"{name}-{group}-{index}"
                marks = {"leaderworkerset.sigs.k8s.io/name": name, INDEX_LABEL: str(index)}
                wanted[pod] = _pod(item, pod, [template[kind]], marks, revision)
        await self._replace(item, wanted, revision)
        groups = [[f"{name}-{g}", *(f"{name}-{g}-{i}" for i in range(1, size))] for g in range(spec["replicas"])]
        known = {pod["metadata"]["name"]: pod for pod in self._items("Pod")}
        ready = sum(all(_ready(known.get(pod)) for pod in group) for group in groups)
        fresh = sum(all(_revision(known.get(pod)) == revision for pod in group) for group in groups)
        status = {"replicas": len(groups), "readyReplicas": ready, "updatedReplicas": fresh}
        await self._status(LWS, item, {**status, "observedGeneration": item["metadata"]["generation"]})

    async def _group(self, item: Object) -> None:
        name = item["metadata"]["name"]
        wanted: dict[str, Object] = {}
        for role in item["spec"]["roles"]:
            pattern = role.get("leaderWorkerPattern")
            parts = [pattern["template"]] if pattern else [role["standalonePattern"]["template"]]
            for replica in range(role.get("replicas", 1)):
                for index in range(pattern["size"] if pattern else 1):
                    pod = f"{name}-{role['name']}-{replica}" + (f"-{index}" if index else "")
                    patch = "workerTemplatePatch" if index else "leaderTemplatePatch"
                    patches = [pattern[patch]] if pattern else []
                    marks = {"rbg.workloads.x-k8s.io/group-name": name}
                    if pattern:
                        marks[INDEX_LABEL] = str(index)
                    wanted[pod] = _pod(item, pod, [*parts, *patches], marks, _digest(role))
        await self._replace(item, wanted, "")
        await self._status(RBG, item, {"observedGeneration": item["metadata"]["generation"]})

    async def _replace(self, owner: Object, wanted: dict[str, Object], _revision_now: str) -> None:
        """Make the owner's pods what it wants: the wrong ones go first."""
        uid = owner["metadata"]["uid"]
        for pod in self._items("Pod"):
            name = pod["metadata"]["name"]
            if not any(each["uid"] == uid for each in pod["metadata"].get("ownerReferences") or ()):
                continue
            goal = wanted.pop(name, None)
            if goal is None or _revision(goal) != _revision(pod):
                await self._remove(pod)
                self._changed.set()
        for goal in wanted.values():
            with contextlib.suppress(AlreadyExistsError):  # its predecessor still leaves; its end brings us here again
                await self._client.create(PODS, goal)

    async def _remove(self, pod: Object) -> None:
        meta = pod["metadata"]
        with contextlib.suppress(NotFoundError):
            await self._client.delete(PODS, meta["name"], meta["namespace"], grace_s=self._grace_s)

    async def _claims(self) -> None:
        """A deleted claim waits until nobody uses it: here nobody does."""
        for claim in self._stores["PersistentVolumeClaim"].values():
            meta = claim["metadata"]
            if meta.get("deletionTimestamp") and meta.get("finalizers"):
                with contextlib.suppress(NotFoundError):
                    patch = {"metadata": {"finalizers": None}}
                    await self._client.patch(PERSISTENT_VOLUME_CLAIMS, meta["name"], meta["namespace"], patch)

    async def _orphans(self) -> None:
        """Pods of an object that went. The real collector learns of a new kind once in 30 s only."""
        there = {
            item["metadata"]["uid"] for kind in ("LeaderWorkerSet", "RoleBasedGroup") for item in self._items(kind)
        }
        for pod in self._items("Pod"):
            owners = pod["metadata"].get("ownerReferences") or ()
            if any(each["kind"] in {LWS.kind, RBG.kind} and each["uid"] not in there for each in owners):
                await self._remove(pod)

    async def _status(self, resource: Resource, item: Object, status: Object) -> None:
        if (item.get("status") or {}) | status == (item.get("status") or {}):
            return
        meta = item["metadata"]
        with contextlib.suppress(NotFoundError):
            await self._client.patch(
                resource, meta["name"], meta["namespace"], {"status": status}, subresource="status"
            )

    # -- gateway ------------------------------------------------------------------------------------------------------

    async def _gateway(self, route: Object) -> None:
        meta = route["metadata"]
        parents = [
            {
                "parentRef": reference,
                "controllerName": "test/gateway",
                "conditions": [
                    {
                        "type": kind,
                        "status": "True",
                        "reason": kind,
                        "message": "",
                        "lastTransitionTime": EPOCH,
                        "observedGeneration": meta["generation"],
                    }
                    for kind in ("Accepted", "ResolvedRefs")
                ],
            }
            for reference in route["spec"].get("parentRefs", ())
        ]
        await self._status(ROUTES, route, {"parents": parents})


def _pod(owner: Object, name: str, templates: list[Object], marks: dict[str, str], revision: str) -> Object:
    labels, annotations = dict(marks), {REVISION: revision}
    for template in templates:
        labels |= template.get("metadata", {}).get("labels") or {}
        annotations |= template.get("metadata", {}).get("annotations") or {}
    meta = owner["metadata"]
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [{**reference, "controller": True}],
        },
        "spec": _merged([template["spec"] for template in templates]),
    }


def _merged(specs: list[Object]) -> Object:
    """A strategic merge, as far as our templates need it: containers by name, in them whole fields."""
    merged: Object = {}
    containers: dict[str, Object] = {}
    for spec in specs:
        merged |= spec
        for each in spec.get("containers", ()):
            containers[each["name"]] = containers.get(each["name"], {}) | each
    return {**merged, "containers": list(containers.values())}


def _is_loader(pod: Object) -> bool:
    return JOB_LABEL in (pod["metadata"].get("labels") or {})


def _container(pod: Object, *, ready: bool = False, **state: Object) -> Object:
    main = pod["spec"]["containers"][0]
    return {
        "name": main["name"],
        "image": main["image"],
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": state,
    }


def _ready(pod: Object | None) -> bool:
    conditions = ((pod or {}).get("status") or {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _revision(pod: Object | None) -> str:
    return str(((pod or {}).get("metadata", {}).get("annotations") or {}).get(REVISION, ""))


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


@contextlib.contextmanager
def in_a_thread(actor: Actor) -> Iterator[Actor]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="actor")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(actor.__aenter__(), loop).result(60)
        try:
            yield actor
        finally:
            asyncio.run_coroutine_threadsafe(actor.__aexit__(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
