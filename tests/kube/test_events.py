"""Events reach `kubectl describe` once per transition, and a crash loop cannot flood the API."""

from __future__ import annotations

from typing import Any

import pytest

from controller.kube.events import BURST, Events, Subject
from controller.kube.resource import CONFIG_MAPS
from tests.harness.kubernetes import KubeApi
from tests.kube.conftest import PEARS, Connect, pear, running, until


async def test_an_event_is_found_by_its_object(pears: KubeApi, kube_namespace: str, connect: Connect) -> None:
    (made,) = pears.apply(pear("a", size=1), namespace=kube_namespace)
    subject = Subject(PEARS, "a", kube_namespace, made["metadata"]["uid"])
    events = Events(await connect(pears.kubeconfig()))
    async with running(events.run):
        events.record(subject, "Ripened", "x" * 3000)
        events.record(subject, "Ripened", "x" * 3000)
        events.record(subject, "Fell", "from the tree", kind="Warning")
        await until(lambda: events.stats.sent == 2)
    path = f"/api/v1/namespaces/{kube_namespace}/events?fieldSelector=involvedObject.uid={subject.uid}"
    found = {each["reason"]: each for each in pears.request("GET", path)["items"]}
    assert set(found) == {"Ripened", "Fell"}
    assert found["Fell"]["type"] == "Warning"
    assert found["Fell"]["source"]["component"] == "arks-controller"
    assert len(found["Ripened"]["message"]) == 1024
    assert events.stats.repeated == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Sink:
    """Stands where the client is; nothing is sent without `run`."""

    async def create(self, *args: Any) -> None:
        raise AssertionError


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(clock: Clock) -> Events:
    return Events(Sink(), per_object=3, clock=clock)  # type: ignore[arg-type]


def subject(name: str) -> Subject:
    return Subject(CONFIG_MAPS, name, "n", "u")


async def test_the_same_thing_is_said_again_only_after_a_while(events: Events, clock: Clock) -> None:
    for _ in range(5):
        events.record(subject("a"), "Failed", "why")
    assert (events._waiting.qsize(), events.stats.repeated) == (1, 4)
    clock.now = 601
    events.record(subject("a"), "Failed", "why")
    assert events._waiting.qsize() == 2


async def test_one_object_that_flaps_has_its_own_bound(events: Events) -> None:
    for n in range(50):
        events.record(subject("a"), "Failed", f"try {n}")
    events.record(subject("b"), "Failed", "why")
    assert (events._waiting.qsize(), events.stats.limited) == (4, 47)


async def test_many_objects_share_a_bound_that_refills(events: Events, clock: Clock) -> None:
    for n in range(500):
        events.record(subject(f"o{n}"), "Failed", "why")
    assert events._waiting.qsize() == BURST
    clock.now = 2.0
    for n in range(500):
        events.record(subject(f"p{n}"), "Failed", "why")
    assert events._waiting.qsize() == BURST + 10


async def test_what_cannot_be_sent_is_dropped(pears: KubeApi, kube_namespace: str, connect: Connect) -> None:
    events = Events(await connect(pears.kubeconfig("u7")))
    async with running(events.run):
        events.record(Subject(PEARS, "a", kube_namespace), "Ripened", "")
        await until(lambda: events.stats.failed == 1)
