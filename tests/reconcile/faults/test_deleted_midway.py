"""A resource deleted ahead of each single write of its walk: it goes, its children go, nothing comes back.

Each object is named after the write ahead of which it is deleted, by a client that asks first. Three fates: gone for
good, gone while a finalizer of Arks holds it, and made anew at once under the same name.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controller.app import Controller
from controller.kube.client import WRITE_VERBS, Client
from controller.kube.credentials import from_kubeconfig
from controller.settings import ControllerSettings
from tests.harness.actor import Actor
from tests.harness.kubernetes import KubeError
from tests.reconcile.conftest import Room, condition, wait_for
from tests.reconcile.faults.world import accepted, still
from tests.reconcile.resources import ENDPOINT, GATEWAY, MODEL, PAIR, SINGLE, STORED_MODEL

pytestmark = pytest.mark.timeout(240)

NEVER = 99  # its walk is never disturbed: it tells what a walk writes
KINDS = {
    "app": ("ArksApplication", SINGLE, "app-qwen", 8),
    "end": ("ArksEndpoint", ENDPOINT, "qwen-7b", 4),
    "mod": ("ArksModel", MODEL, "qwen-7b", 6),
    "par": ("ArksDisaggregatedApplication", PAIR, "pd", 13),
}
"""by name: kind, document, the document's name, ahead of how many writes it is deleted"""
CHILDREN = (
    "Deployment",
    "HTTPRoute",
    "Job",
    "LeaderWorkerSet",
    "PersistentVolumeClaim",
    "Role",
    "RoleBasedGroup",
    "RoleBinding",
    "Service",
    "ServiceAccount",
)
NAME = re.compile(r"(app|end|mod|par)-(gone|held|anew)-(\d+)x")


class Deleter:
    """Whoever deletes, ahead of which write, and what was made anew."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.steps: Counter[str] = Counter()
        self.deleted: dict[str, str] = {}
        """ahead of which resource's write"""
        self.undisturbed: set[tuple[str, str]] = set()

    async def ahead_of(self, resource: str, name: str) -> None:
        found = NAME.search(name)
        if found is None:
            return
        whole, kind, fate, step = found[0], *found.groups()
        self.steps[whole] += 1
        if int(step) == NEVER:
            self.undisturbed.add((kind, resource))
        if self.steps[whole] == int(step) and whole not in self.deleted:
            self.deleted[whole] = resource
            await asyncio.to_thread(self._delete, kind, fate, whole)

    def _delete(self, kind: str, fate: str, name: str) -> None:
        self.room.delete(KINDS[kind][0], name)
        if fate == "anew":
            self.room.apply(document(kind, name))


class AskingClient(Client):
    deleter: Deleter

    async def _call(self, verb, method, resource, namespace="", name="", subresource="", **more):
        if verb in WRITE_VERBS and resource.plural not in {"leases", "events"}:
            await self.deleter.ahead_of(f"{resource.plural}/{subresource}", name)
        return await super()._call(verb, method, resource, namespace, name, subresource, **more)


def document(kind: str, name: str, *, held: bool = False) -> str:
    _, text, usual, _ = KINDS[kind]
    meta = f"name: {name}" + (", finalizers: [application.arks.ai/controller]" if held else "")
    text = text.replace(f"{{name: {usual}}}", f"{{{meta}}}", 1)
    # A claim of its own: two models on one would be another story.
    return text.replace("name: qwen-7b\n", f"name: {name}\n") if kind == "mod" else text


@pytest.fixture
async def deleter(hall: Room) -> AsyncIterator[Deleter]:
    found = Deleter(hall)
    async with AskingClient(from_kubeconfig(str(hall.api.kubeconfig("controller")))) as client:
        client.deleter = found
        controller = Controller(client, ControllerSettings(namespace="arks-system", environment={}, discovery_s=0.5))
        running = asyncio.create_task(controller.run())
        try:
            async with Actor(hall.api, hall.namespace):
                yield found
                assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    await asyncio.sleep(0.05)  # TLS connections of broken-off watches say good-bye


async def test_resources_deleted_ahead_of_every_write_of_their_walk(hall: Room, deleter: Deleter):
    await asyncio.to_thread(hall.apply, GATEWAY, STORED_MODEL)
    await hall.phase("ArksModel", "qwen-7b", "Ready")
    fates = ("gone", "held", "anew")
    names = [f"{kind}-{fate}-{n}x" for kind in KINDS for fate in fates for n in range(1, KINDS[kind][3] + 1)]
    names += [f"{kind}-anew-{NEVER}x" for kind in KINDS]
    for name in names:
        kind, fate, _ = name.split("-")
        await asyncio.to_thread(hall.apply, document(kind, name, held=fate == "held"))

    def late() -> list[str]:
        return [name for name in names if name not in deleter.deleted and not finished(hall, name)]

    # Every walk was either cut off, or shorter than the write at which it would have been.
    await until_none(late)
    for fate in fates:
        cut = {(name[:3], resource) for name, resource in deleter.deleted.items() if fate in name}
        assert deleter.undisturbed <= cut
    assert len(deleter.undisturbed) >= 12
    # Whoever was not cut off goes now.
    for name in names:
        if name not in deleter.deleted and "anew" not in name:
            await asyncio.to_thread(hall.delete, KINDS[name[:3]][0], name)
    await until_none(lambda: [name for name in left(hall) if "anew" not in name])
    await until_none(lambda: [name for name in names if "anew" in name and not finished(hall, name)])
    await still(hall)
    # And nothing came back.
    assert not [name for name in left(hall) if "anew" not in name]
    assert not [name for name in names if "anew" in name and not finished(hall, name)]
    strays = [(item["kind"], item["metadata"]["name"]) for item in children(hall) if not owned(hall, item)]
    assert not strays


async def until_none(check: Any, timeout_s: float = 90.0) -> None:
    try:
        await wait_for(lambda: not check(), timeout_s)
    except TimeoutError:
        raise AssertionError(f"still there: {check()}") from None


def left(hall: Room) -> list[str]:
    """Of ours and of what was made for them."""
    items = [*children(hall), *(each for kind, *_ in KINDS.values() for each in hall.list(kind))]
    return [f"{each['kind']} {each['metadata']['name']}" for each in items if NAME.search(each["metadata"]["name"])]


def children(hall: Room) -> list[Any]:
    return [each for kind in CHILDREN for each in hall.list(kind)]


def owned(hall: Room, item: Any) -> bool:
    references = item["metadata"].get("ownerReferences") or ()
    if not NAME.search(item["metadata"]["name"]):
        return True
    return all(hall.get(each["kind"], each["name"])["metadata"]["uid"] == each["uid"] for each in references)


def finished(hall: Room, name: str) -> bool:
    kind = KINDS[name[:3]][0]
    try:
        item = hall.get(kind, name)
    except KubeError:
        return False
    status = item.get("status", {})
    if status.get("observedGeneration") != item["metadata"]["generation"]:
        return False
    if kind == "ArksEndpoint":
        return accepted(item) and (condition(item, "Programmed") or {}).get("reason") == "NoBackends"
    return status.get("phase") in {"Running", "Ready"}
