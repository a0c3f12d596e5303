"""List and watch on a healthy API server: everything arrives, once, and one bad object harms no other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.kube.client import decoder
from controller.kube.reflector import Reflector
from controller.kube.resource import Key, Resource
from controller.kube.store import Store
from tests.harness.kubernetes import KubeApi
from tests.kube.conftest import PEAR_CRD, PEARS, Changes, Connect, Pear, pear, running, until


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "pages"])
async def test_first_sync_then_every_change_is_told_once(
    pears: KubeApi, kube_namespace: str, connect: Connect, streaming: bool
) -> None:
    pears.apply(*(pear(f"p{n}", size=n) for n in range(25)), namespace=kube_namespace)
    changes = Changes()
    client = await connect(pears.kubeconfig())
    store: Store[Pear] = Store(by_color=lambda each: [each.spec.color])
    reflector = Reflector(
        client,
        PEARS,
        decoder(Pear),
        store=store,
        namespace=kube_namespace,
        on_change=changes,
        streaming=streaming,
        page=10,
    )
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        assert {key.name: value.spec.size for key, value in store.items()} == {f"p{n}": n for n in range(25)}
        assert len(changes.seen) == 25
        pears.apply(pear("p1", size=100, color="red"), pear("new", size=7), namespace=kube_namespace)
        pears.delete("kube.test/v1", "Pear", "p2", kube_namespace)
        await until(lambda: changes.of("p2") == ["added", "deleted"])
        assert changes.of("p1") == ["added", "modified"]
        assert changes.of("new") == ["added"]
        assert len(changes.seen) == 28
        assert store.keys_by("by_color", "red") == [Key(kube_namespace, "p1")]
        assert store.get(Key(kube_namespace, "p2")) is None
        pears.apply(pear("p1", size=100), namespace=kube_namespace)
        await until(lambda: store.keys_by("by_color", "red") == [])
    assert reflector.stats.lists == 1
    assert client.stats.calls["list", "kube.test", "pears", "200"] == (0 if streaming else 3)
    assert reflector.stats.errors == 0
    assert reflector.age_s < 60


async def test_an_object_as_a_plain_dict(pears: KubeApi, kube_namespace: str, connect: Connect) -> None:
    pears.apply(pear("one", size=1, text="x" * 300_000), namespace=kube_namespace)
    client = await connect(pears.kubeconfig())
    reflector: Reflector[dict[str, Any]] = Reflector(client, PEARS, decoder(dict), namespace=kube_namespace)
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        found = reflector.store.get(Key(kube_namespace, "one"))
        assert found is not None
        assert len(found["spec"]["text"]) == 300_000


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "pages"])
async def test_a_malformed_object_poisons_nothing_and_heals(
    pears: KubeApi, kube_namespace: str, connect: Connect, streaming: bool
) -> None:
    pears.apply(pear("bad", size="a secret"), pear("good", size=1), namespace=kube_namespace)
    told: list[tuple[Key, str]] = []
    client = await connect(pears.kubeconfig())
    reflector = Reflector(
        client,
        PEARS,
        decoder(Pear),
        namespace=kube_namespace,
        streaming=streaming,
        on_malformed=lambda key, what: told.append((key, what)),
    )
    bad = Key(kube_namespace, "bad")
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        assert [key.name for key in reflector.store] == ["good"]
        assert told == [(bad, "Expected `int`, got `str` - at `$.spec.size`")]
        assert set(reflector.malformed) == {bad}
        pears.apply(pear("bad", size=2), namespace=kube_namespace)
        await until(lambda: bad in reflector.store)
        assert not reflector.malformed
        pears.apply(pear("bad", size="again"), namespace=kube_namespace)
        await until(lambda: bad in reflector.malformed)
        kept = reflector.store.get(bad)
        assert kept is not None
        assert kept.spec.size == 2
        pears.delete("kube.test/v1", "Pear", "bad", kube_namespace)
        await until(lambda: bad not in reflector.store)
        assert not reflector.malformed


async def test_an_object_that_must_be_readable_to_count_leaves_when_it_is_not(
    pears: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    pears.apply(pear("token", size=1), namespace=kube_namespace)
    changes = Changes()
    client = await connect(pears.kubeconfig())
    reflector = Reflector(
        client, PEARS, decoder(Pear), namespace=kube_namespace, on_change=changes, keep_last_good=False
    )
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        pears.apply(pear("token", size="x"), namespace=kube_namespace)
        await until(lambda: changes.of("token") == ["added", "deleted"])
        assert len(reflector.store) == 0


async def test_a_handler_that_raises_does_not_stop_the_watch(
    pears: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    def broken(key: Key, new: object, old: object) -> None:
        raise ValueError(key)

    client = await connect(pears.kubeconfig())
    reflector = Reflector(client, PEARS, decoder(Pear), namespace=kube_namespace, on_change=broken)
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        pears.apply(pear("a", size=1), pear("b", size=1), namespace=kube_namespace)
        await until(lambda: len(reflector.store) == 2)
        assert reflector.stats.handler_errors == 2
        assert reflector.stats.errors == 0


async def test_a_kind_installed_later_appears_and_a_removed_one_is_forgotten_only_after_a_while(
    kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    plum = Resource("late.test", "v1", "plums", "Plum")
    crd = PEAR_CRD | {"metadata": {"name": "plums.late.test"}}
    crd["spec"] = PEAR_CRD["spec"] | {"group": "late.test", "names": {"plural": "plums", "kind": "Plum"}}
    client = await connect(kube_api.kubeconfig())
    reflector = Reflector(client, plum, decoder(Pear), backoff_max_s=0.3, absent_after_s=1.0)
    key = Key(kube_namespace, "one")
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        assert len(reflector.store) == 0
        await asyncio.to_thread(
            kube_api.apply,
            crd,
            pear("one", size=1) | {"apiVersion": "late.test/v1", "kind": "Plum"},
            namespace=kube_namespace,
        )
        await until(lambda: key in reflector.store)
        began = asyncio.get_running_loop().time()
        kube_api.request("DELETE", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/plums.late.test")
        await until(lambda: not reflector.store)
        deleted_by_the_watch = reflector.stats.events >= 2
        assert deleted_by_the_watch or asyncio.get_running_loop().time() - began >= 1.0


async def test_only_what_is_selected_arrives(pears: KubeApi, kube_namespace: str, connect: Connect) -> None:
    labelled = pear("in", size=1)
    labelled["metadata"]["labels"] = {"app": "arks"}
    pears.apply(labelled, pear("out", size=1), namespace=kube_namespace)
    client = await connect(pears.kubeconfig())
    reflector = Reflector(client, PEARS, decoder(Pear), namespace=kube_namespace, label_selector="app=arks")
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        assert [key.name for key in reflector.store] == ["in"]
