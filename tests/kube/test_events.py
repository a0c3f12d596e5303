"""Events reach `kubectl describe` once per transition, and a crash loop cannot flood the API."""

from __future__ import annotations

from typing import Any

import pytest

from controller.kube.errors import NotLeaderError, UnreachableError, api_error
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


class Shaky:
    """Fails as told, then takes everything."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.names = list(errors), []

    async def create(self, resource: Any, event: Any, namespace: str) -> None:
        self.names.append(event["metadata"]["name"])
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.parametrize("error", [UnreachableError("timed out"), NotLeaderError("lost"), api_error(503, b"busy")])
async def test_an_event_waits_for_a_server_that_is_away_and_is_sent_once(error: Exception) -> None:
    client = Shaky(error, api_error(409, b'{"reason": "AlreadyExists"}'))
    events = Events(client)  # type: ignore[arg-type]
    async with running(events.run):
        events.record(subject("a"), "Failed", "why")
        await until(lambda: events.stats.sent == 1)
    assert len(client.names) == 2
    assert len(set(client.names)) == 1


async def test_what_one_leadership_could_not_send_the_next_one_does_unless_it_is_old(clock: Clock) -> None:
    client = Shaky(NotLeaderError("lost"))
    events = Events(client, clock=clock)  # type: ignore[arg-type]

    async def lead(name: str, calls: int) -> None:
        async with running(events.run):
            events.record(subject(name), "Failed", "why")
            await until(lambda: len(client.names) == calls)

    await lead("a", 1)
    clock.now += 500
    client.errors = []
    await lead("b", 3)
    client.errors = [NotLeaderError("lost")]
    await lead("c", 4)
    clock.now += 601
    await lead("d", 5)
    assert [name.partition(".")[0] for name in client.names] == ["a", "a", "b", "c", "d"]
    assert (events.stats.sent, events.stats.failed) == (3, 0)
