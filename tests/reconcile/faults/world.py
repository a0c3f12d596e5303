"""A small world that a controller keeps, somebody who goes on changing it, and what must be true of it in the end."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Self

from tests.harness.actor import Actor
from tests.harness.audit import Write
from tests.harness.kubernetes import KubeError, Object
from tests.reconcile.conftest import VERSIONS, Room, condition, wait_for
from tests.reconcile.faults.process import ControllerProcess
from tests.reconcile.resources import GATEWAY, MODEL, QUICKSTART, TOKEN

Start = Callable[[str], ControllerProcess]
CONVERGE_S = 120.0
DEPUTY = "u1"
STILL_S = 1.5
PACE_S = 0.2
TOKENS_KEPT = 4
# What the controller makes, and for whom.
OWNED = ("Service", "HTTPRoute", "Job", "PersistentVolumeClaim", "RoleBasedGroup", "Role", "RoleBinding")


class World:
    """Arks' quickstart in one namespace, kept by `process` (or whoever leads)."""

    def __init__(self, room: Room, process: ControllerProcess, actor: Actor) -> None:
        self.room, self.process, self.actor = room, process, actor
        self.tokens, self.models = ["example-token"], ["qwen-7b"]
        self.weight, self.replicas = 5, 1
        self._numbers = itertools.count(1)

    async def begin(self) -> None:
        await asyncio.to_thread(self.room.apply, GATEWAY, QUICKSTART)
        await self.settled()

    # -- changes ------------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        """A new token, an old one less, another weight, a replica more or less; each until the API server took it."""
        number = next(self._numbers)
        name = f"late-{number}"
        await insist(self.room.apply, TOKEN.replace("example-token", name).replace("sk-test123456", f"sk-{name}"))
        self.tokens.append(name)
        if len(self.tokens) > TOKENS_KEPT:
            gone = self.tokens.pop(1)
            await insist(self._without, gone)
        self.weight = 5 + number
        await insist(self.room.patch, "ArksEndpoint", "qwen-7b", {"spec": {"defaultWeight": self.weight}})
        self.replicas = 3 - self.replicas
        await insist(self.room.patch, "ArksApplication", "app-qwen", {"spec": {"replicas": self.replicas}})

    def _without(self, token: str) -> None:
        try:
            self.room.delete("ArksToken", token)
        except KubeError as error:
            if error.status != 404:  # the answer to a first try was lost
                raise

    async def another_model(self) -> None:
        """A download to be begun: a claim and a Job, one of each."""
        name = f"model-{next(self._numbers)}"
        await insist(self.room.apply, MODEL.replace("qwen-7b", name))
        self.models.append(name)

    # -- what must be true --------------------------------------------------------------------------------------------

    async def settled(self, timeout_s: float = CONVERGE_S) -> None:
        """Everything is as it was asked for, and then nothing is written any more."""
        seen = ["not looked at"]

        def right() -> bool:
            try:
                seen[0] = self.wrong()
            except (KubeError, OSError, http.client.HTTPException) as error:
                seen[0] = f"cannot look: {error}"
            return not seen[0]

        until = time.monotonic() + timeout_s
        while True:
            try:
                await wait_for(right, until - time.monotonic())
            except TimeoutError:
                log = "\n".join(map(str, self.process.log()[-40:]))
                raise AssertionError(f"after {timeout_s:.0f} s still wrong: {seen[0]}\n{log}") from None
            await still(self.room)
            # Looked at once more: what was right for a moment may have been on its way to something else.
            if await asyncio.to_thread(right) and self.actor.idle:
                return

    def wrong(self) -> str:
        """The first thing that is not as it should be."""
        looks = (self._tokens, self._endpoint, self._application, self._models)
        return next((text for look in looks for text in look()), "")

    def _tokens(self) -> Iterable[str]:
        found = {each["metadata"]["name"]: each for each in self.room.list("ArksToken")}
        if sorted(found) != sorted(self.tokens):
            yield f"tokens are {sorted(found)}"
        yield from (f"token {name}" for name, item in found.items() if not accepted(item))
        if not accepted(self.room.get("ArksQuota", "basic-quota")):
            yield "quota"

    def _endpoint(self) -> Iterable[str]:
        endpoint, route = self.room.get("ArksEndpoint", "qwen-7b"), self.room.find("HTTPRoute", "qwen-7b")
        if not (accepted(endpoint) and (condition(endpoint, "Programmed") or {}).get("status") == "True"):
            yield f"endpoint says {endpoint.get('status')}"
        if [each["weight"] for each in endpoint.get("status", {}).get("routes", ())] != [self.weight]:
            yield f"endpoint's weight is not {self.weight}"
        if route is None or [each["weight"] for each in _backends(route)] != [self.weight]:
            yield f"route's weight is not {self.weight}"

    def _application(self) -> Iterable[str]:
        app = self.room.get("ArksApplication", "app-qwen")
        status = app.get("status", {})
        wanted = {"phase": "Running", "observedGeneration": app["metadata"]["generation"]}
        wanted |= dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas"), self.replicas)
        if not wanted.items() <= status.items():
            yield f"application says {status}, not {wanted}"
        groups = sorted(each["metadata"]["name"] for each in self.room.list("RoleBasedGroup"))
        if groups != [f"app-qwen-{index}" for index in range(self.replicas)]:
            yield f"groups are {groups}"

    def _models(self) -> Iterable[str]:
        models = {each["metadata"]["name"]: each for each in self.room.list("ArksModel")}
        yield from (f"model {name}" for name in self.models if models[name].get("status", {}).get("phase") != "Ready")
        for kind, prefix in (("Job", "arks-worker-"), ("PersistentVolumeClaim", "")):
            found = sorted(each["metadata"]["name"] for each in self.room.list(kind))
            if found != sorted(f"{prefix}{name}" for name in self.models):
                yield f"{kind}s are {found}"
        kinds = ("ArksApplication", "ArksEndpoint", "ArksModel")
        there = {each["metadata"]["uid"] for kind in kinds for each in self.room.list(kind)}
        for kind in OWNED:
            for item in self.room.list(kind):
                owners = [each["uid"] for each in item["metadata"].get("ownerReferences") or ()]
                if len(owners) != 1 or not there.issuperset(owners):
                    yield f"{kind} {item['metadata']['name']} belongs to {owners}"


class Changing:
    """`async with Changing(world)`: changes go on all the time, and once more after the fault is over."""

    def __init__(self, world: World) -> None:
        self._world, self._task, self._stop = world, None, asyncio.Event()
        self.rounds = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        if failed:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            return
        await self._task
        await self._world.change()

    async def _run(self) -> None:
        await self._world.another_model()
        while not self._stop.is_set():
            await self._world.change()
            self.rounds += 1
            await asyncio.sleep(PACE_S)


def seen(world: World, event: str, **fields: str) -> Callable[[], bool]:
    """Has the controller said this again since now?"""
    before = len(world.process.said(event, **fields))
    return lambda: len(world.process.said(event, **fields)) > before


def alive(world: World) -> None:
    """There is no reason to start it anew, and its stores still serve."""
    assert world.process.running
    for path in ("/healthz", "/readyz"):
        assert (path, *world.process.get(path)) == (path, 200, "ok")


async def over(world: World, mark: int) -> None:
    """The fault has ended: everything converges, and nothing was done that must not be."""
    process, room = world.process, world.room
    # The API server may have told some watches to come back in 5 s. What they then hear may change what is right now.
    await wait_for(lambda: process.metric("arks_controller_watch_outage_seconds") == 0 and world.actor.up_to_date)
    await world.settled()
    await wait_for(lambda: process.leads)
    alive(world)
    # What is gone is gone for the controller, too, and a pass over what is right writes nothing.
    for kind in ("ArksApplication", "ArksEndpoint", "ArksModel", "ArksQuota", "ArksToken", "HTTPRoute"):
        known = len(room.api.list(VERSIONS.get(kind, "arks.ai/v1"), kind))
        await wait_for(
            lambda kind=kind, known=known: process.metric("arks_controller_objects", kind=kind) == known,
            what=f"{known} of {kind} are known",
        )
    passes, settled = process.metric("arks_controller_passes_total", outcome="done"), room.api.audit.mark()
    for kind, name in (("Gateway", "arks-eg"), ("Pod", room.list("Pod")[0]["metadata"]["name"])):
        await asyncio.to_thread(room.patch, kind, name, {"metadata": {"annotations": {"seen": str(passes)}}})

    def looked() -> bool:
        """Twice more, or from the beginning, as a new leadership does."""
        done = process.metric("arks_controller_passes_total", outcome="done")
        return done >= passes + 2 or 2 <= done < passes

    await wait_for(looked)
    await still(room)
    written = writes(room, settled)
    assert not written, f"a pass over what is right wrote {written}"
    await wait_for(lambda: process.metric("arks_controller_queue_depth") == 0)
    assert not process.tracebacks()
    late, twice = unfenced(room, mark), made_twice(writes(room, mark))
    assert not late, f"written without the Lease: {late}"
    history = [each for each in writes(room, mark) if (each.resource, each.namespace, each.name) in twice]
    assert not twice, f"made twice: {history}"


async def insist(call: Callable[..., Any], *arguments: Any, timeout_s: float = 400.0) -> Any:
    """Make the call until it succeeds, in a thread: what breaks the server breaks our calls, too."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return await asyncio.to_thread(call, *arguments)
        except (KubeError, OSError, http.client.HTTPException):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(PACE_S)


async def still(room: Room, for_s: float = STILL_S, timeout_s: float = 90.0) -> None:
    """Until no controller has written anything for a while, Leases aside."""
    audit, began = room.api.audit, time.monotonic()
    mark, since = audit.mark(), began
    while time.monotonic() - since < for_s:
        written = writes(room, mark)
        if written:
            mark, since = audit.mark(), time.monotonic()
            last = written[-1]
            assert since - began < timeout_s, f"it never ends: {last}"
        await asyncio.sleep(0.1)


def writes(room: Room, since: int = 0) -> list[Write]:
    """Of all our controllers, Leases and Events aside: these are for people, and have a budget of their own."""
    return [each for each in _ours(room, since) if each.resource not in {"leases", "events"}]


def _ours(room: Room, since: int = 0) -> list[Write]:
    users = {room.api.user_name("controller"), DEPUTY}
    return [each for each in room.api.audit.writes(since=since) if each.user in users]


def unfenced(room: Room, since: int) -> list[Write]:
    """Writes since then by somebody after another one had taken the Lease. Events, too."""
    holder, found = "", []
    recent = set(_ours(room, since))
    for each in sorted(_ours(room), key=lambda write: write.asked_s):
        if each.resource != "leases":
            if each.user != holder and each in recent:
                found.append(each)
        elif each.taken and each.holder:
            holder = each.user
    return found


def made_twice(written: Iterable[Write]) -> list[tuple[str, ...]]:
    """Objects that were created more often than they were deleted by us, and once."""
    made, gone = Counter(), Counter()
    for each in written:
        slot = (each.resource, each.namespace, each.name)
        made[slot] += each.made
        gone[slot] += each.verb == "delete" and each.taken
    return [slot for slot, count in made.items() if count > 1 + gone[slot]]


def accepted(item: Object) -> bool:
    found = condition(item, "Accepted") or {}
    generation = item["metadata"]["generation"]
    return (found.get("status"), found.get("observedGeneration")) == ("True", generation)


def _backends(route: Object) -> list[Object]:
    return route["spec"]["rules"][0].get("backendRefs") or []
