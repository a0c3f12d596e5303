"""Reads and writes on a real API server: what server-side apply promises, and what each refusal means."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from controller.kube.apply import Applier
from controller.kube.client import Client, decoder
from controller.kube.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    MalformedError,
    NotFoundError,
    NotLeaderError,
    TooManyRequestsError,
    UnauthorizedError,
    UnreachableError,
)
from controller.kube.resource import CONFIG_MAPS, PODS, Resource
from tests.harness.kubernetes import KubeApi
from tests.harness.tcp_proxy import TcpProxy
from tests.kube.conftest import PEARS, Connect, Pear, pear
from tests.kube.test_watching_with_faults import Scripted, refusal


@pytest.fixture
async def client(pears: KubeApi, connect: Connect) -> Client:
    return await connect(pears.kubeconfig())


async def test_the_same_apply_again_writes_nothing(client: Client, kube_namespace: str) -> None:
    body = pear("a", kube_namespace, size=1, color="red")
    first = await client.apply(PEARS, body)
    again = await client.apply(PEARS, body)
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert [entry["manager"] for entry in again["metadata"]["managedFields"]] == ["arks-controller"]


async def test_apply_removes_what_we_no_longer_want_and_leaves_what_others_set(
    client: Client, pears: KubeApi, kube_namespace: str
) -> None:
    await client.apply(PEARS, pear("a", kube_namespace, size=1, color="red"))
    pears.apply(pear("a", text="theirs"), namespace=kube_namespace)
    left = await client.apply(PEARS, pear("a", kube_namespace, size=1))
    assert left["spec"] == {"size": 1, "text": "theirs"}


async def test_drift_is_corrected(client: Client, pears: KubeApi, kube_namespace: str) -> None:
    await client.apply(PEARS, pear("a", kube_namespace, size=1))
    pears.apply(pear("a", size=9), namespace=kube_namespace)
    with pytest.raises(ConflictError) as refused:
        await client.apply(PEARS, pear("a", kube_namespace, size=1), force=False)
    assert refused.value.causes[0].field == ".spec.size"
    assert (await client.apply(PEARS, pear("a", kube_namespace, size=1)))["spec"] == {"size": 1}


async def test_an_apply_of_a_stale_version_is_refused(client: Client, kube_namespace: str) -> None:
    first = await client.apply(PEARS, pear("a", kube_namespace, size=1))
    await client.apply(PEARS, pear("a", kube_namespace, size=2))
    stale = pear("a", kube_namespace, size=3)
    stale["metadata"]["resourceVersion"] = first["metadata"]["resourceVersion"]
    with pytest.raises(ConflictError) as refused:
        await client.apply(PEARS, stale)
    assert not refused.value.permanent


async def test_a_field_the_schema_lacks_is_never_tried_again(client: Client, kube_namespace: str) -> None:
    with pytest.raises(InvalidError) as refused:
        await client.apply(PEARS, pear("a", kube_namespace, nonsense=1))
    assert refused.value.permanent
    assert refused.value.status == 500


async def test_a_rejected_value_does_not_reach_the_error_text(client: Client, kube_namespace: str) -> None:
    with pytest.raises(InvalidError) as refused:
        await client.apply(PEARS, pear("a", kube_namespace, color="sk-secret-" + "x" * 20))
    assert "sk-secret" not in str(refused.value)
    assert "sk-secret" not in repr(refused.value.causes)
    assert refused.value.causes[0].field == "spec.color"


async def test_status_of_an_object_that_is_gone_creates_nothing(client: Client, kube_namespace: str) -> None:
    with pytest.raises(NotFoundError):
        await client.apply_status(PEARS, "a", kube_namespace, {"phase": "Ripe"})
    await client.apply(PEARS, pear("a", kube_namespace, size=1))
    found = await client.apply_status(PEARS, "a", kube_namespace, {"phase": "Ripe"})
    assert (found["status"], found["spec"]) == ({"phase": "Ripe"}, {"size": 1})
    same = await client.apply_status(PEARS, "a", kube_namespace, {"phase": "Ripe"})
    assert same["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]
    # The spec's apply does not take the status along.
    assert (await client.apply(PEARS, pear("a", kube_namespace, size=2)))["status"] == {"phase": "Ripe"}


async def test_read_create_replace_patch_delete(client: Client, kube_namespace: str) -> None:
    for n in range(7):
        await client.create(CONFIG_MAPS, {"metadata": {"name": f"c{n}", "namespace": kube_namespace}})
    with pytest.raises(AlreadyExistsError):
        await client.create(CONFIG_MAPS, {"metadata": {"name": "c1", "namespace": kube_namespace}})
    listed = await client.list(CONFIG_MAPS, kube_namespace, field_selector="metadata.name!=c6")
    assert sorted(each["metadata"]["name"] for each in listed) == [f"c{n}" for n in range(6)]
    one = await client.get(CONFIG_MAPS, "c1", kube_namespace)
    replaced = await client.replace(CONFIG_MAPS, one | {"data": {"a": "1"}})
    with pytest.raises(ConflictError):
        await client.replace(CONFIG_MAPS, one | {"data": {"a": "2"}})
    patched = await client.patch(CONFIG_MAPS, "c1", kube_namespace, {"metadata": {"finalizers": ["kube.test/stay"]}})
    assert patched["data"] == replaced["data"] == {"a": "1"}
    await client.patch(CONFIG_MAPS, "c1", kube_namespace, {"metadata": {"finalizers": None}})
    with pytest.raises(ConflictError):
        await client.delete(CONFIG_MAPS, "c1", kube_namespace, uid="another")
    await client.delete(CONFIG_MAPS, "c1", kube_namespace, uid=one["metadata"]["uid"])
    with pytest.raises(NotFoundError):
        await client.delete(CONFIG_MAPS, "c1", kube_namespace)


async def test_an_object_that_does_not_decode_is_not_quoted(client: Client, kube_namespace: str) -> None:
    await client.apply(PEARS, pear("a", kube_namespace, size="sk-secret"))
    with pytest.raises(MalformedError, match=r"\$\.spec\.size") as refused:
        await client.get(PEARS, "a", kube_namespace, decode=decoder(Pear))
    assert "sk-secret" not in str(refused.value)


async def test_a_page_of_some_portal_is_no_object(connect: Connect, tmp_path: Path) -> None:
    async with Scripted(web.Response(text="<html>sign in</html>")).serving(tmp_path) as config:
        with pytest.raises(MalformedError):
            await (await connect(config)).get(PODS, "a", "b")


async def test_an_object_decodes_to_the_type_asked_for(client: Client, kube_namespace: str) -> None:
    await client.apply(PEARS, pear("a", kube_namespace, size=4))
    assert (await client.get(PEARS, "a", kube_namespace, decode=decoder(Pear))).spec.size == 4
    assert [each.spec.size for each in await client.list(PEARS, kube_namespace, decode=decoder(Pear))] == [4]


async def test_missing_rights_and_bad_tokens_have_their_own_errors(
    pears: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    weak = await connect(pears.kubeconfig("u2"))
    with pytest.raises(ForbiddenError, match="u2"):
        await weak.list(PODS, kube_namespace)
    unknown = await connect(pears.kubeconfig(credentials={"token": "wrong"}))
    with pytest.raises(UnauthorizedError):
        await unknown.get(PODS, "x", kube_namespace)
    assert weak.stats.calls == {("list", "", "pods", "403"): 1}


async def test_a_write_without_the_lease_is_not_sent(client: Client, kube_namespace: str) -> None:
    left_s = [60.0]

    def fence() -> float:
        if not left_s:
            raise NotLeaderError("lost")
        return left_s[0]

    leader = client.fenced(fence)
    await leader.apply(PEARS, pear("a", kube_namespace, size=1))
    left_s.clear()
    for write in (
        leader.apply(PEARS, pear("a", kube_namespace, size=2)),
        leader.create(PEARS, pear("b", kube_namespace)),
        leader.patch(PEARS, "a", kube_namespace, {}),
        leader.replace(PEARS, pear("a", kube_namespace)),
        leader.delete(PEARS, "a", kube_namespace),
        leader.apply_status(PEARS, "a", kube_namespace, {}),
    ):
        with pytest.raises(NotLeaderError):
            await write
    assert client.stats.writes_fenced == 6
    assert (await leader.get(PEARS, "a", kube_namespace))["spec"] == {"size": 1}
    assert [each["metadata"]["name"] for each in await leader.list(PEARS, kube_namespace)] == ["a"]


async def test_a_write_ends_before_the_lease_does(pears: KubeApi, kube_namespace: str, connect: Connect) -> None:
    async with TcpProxy(pears.port) as proxy:
        client = await connect(pears.kubeconfig(server=proxy.url))
        await client.apply(PEARS, pear("a", kube_namespace, size=1))
        proxy.black_hole()
        began = asyncio.get_running_loop().time()
        with pytest.raises(UnreachableError, match="timed out"):
            await client.fenced(lambda: 0.4).apply(PEARS, pear("a", kube_namespace, size=2))
        assert asyncio.get_running_loop().time() - began < client.timeout_s / 2


async def test_a_task_that_is_cancelled_in_the_moment_in_which_its_write_times_out_ends(
    pears: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    """As when the lease is lost: its end is the limit of every write, and all who write are cancelled."""
    loop = asyncio.get_running_loop()
    async with TcpProxy(pears.port) as proxy:
        client = await connect(pears.kubeconfig(server=proxy.url))
        await client.apply(PEARS, pear("a", kube_namespace, size=1))
        proxy.black_hole()
        for limit_s in (0.3, 3.0, 10.0):
            due = loop.time() + limit_s

            def left_s(due: float = due) -> float:
                return due - loop.time()

            task = asyncio.create_task(client.fenced(left_s).apply(PEARS, pear("a", kube_namespace, size=2)))
            loop.call_at(due + 0.1, task.cancel)
            await asyncio.sleep(0.1)  # it is under way
            in_time = left_s() > 0  # else it was the loop that was late
            # Both are due by the time the loop looks again.
            time.sleep(max(0.0, left_s() + 0.3))  # noqa: ASYNC251 - it is the loop that is to be late
            await asyncio.wait([task])
            if in_time:
                break
            with contextlib.suppress(KubeError, asyncio.CancelledError):
                await task
        assert in_time
        assert task.cancelled()


async def test_a_watch_that_is_left_leaves_no_connection_behind(
    pears: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    """Nor waits for the other end, which may be dead."""
    async with TcpProxy(pears.port) as proxy:
        client = await connect(pears.kubeconfig(server=proxy.url))
        async with client.open(PEARS, kube_namespace, {"watch": "true"}) as stream:
            proxy.black_hole()
            socket = stream._protocol.transport.get_extra_info("socket")
            assert socket.fileno() >= 0
        async with asyncio.timeout(20):
            while socket.fileno() >= 0:  # noqa: ASYNC110 - a transport tells nobody
                await asyncio.sleep(0)


async def test_a_dead_server_is_an_error_of_ours_not_of_aiohttp(connect: Connect, tmp_path: Path) -> None:
    async with Scripted().serving(tmp_path) as config:
        client = await connect(config)
    with pytest.raises(UnreachableError) as refused:
        await client.get(PODS, "a", "b")
    assert isinstance(refused.value, KubeError)
    assert not refused.value.permanent


@pytest.mark.parametrize(("said", "waits_s"), [("7", 7.0), ("86400", 30.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0)])
async def test_retry_after_is_known_to_the_caller(said: str, waits_s: float, connect: Connect, tmp_path: Path) -> None:
    async with Scripted(refusal(429, said)).serving(tmp_path) as config:
        with pytest.raises(TooManyRequestsError) as refused:
            await (await connect(config)).get(PODS, "a", "b")
        assert refused.value.retry_after_s == waits_s


async def test_a_redirect_does_not_carry_the_token_elsewhere(connect: Connect, tmp_path: Path) -> None:
    moved = web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
    async with Scripted(moved).serving(tmp_path) as config:
        with pytest.raises(KubeError):
            await (await connect(config)).get(PODS, "a", "b")


async def test_a_lease_that_ends_between_the_decision_and_the_socket_keeps_the_write_back(
    client: Client, pears: KubeApi, kube_namespace: str
) -> None:
    asked = 0

    def fence() -> float:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise NotLeaderError("another leads by now")
        return 5.0

    leader = client.fenced(fence)
    body = pear("a", kube_namespace, size=1)
    for write in (leader.apply(PEARS, body), leader.create(PEARS, body), leader.delete(PEARS, "a", kube_namespace)):
        asked = 0
        with pytest.raises(NotLeaderError):
            await write
    assert client.stats.writes_fenced == 3
    assert not pears.list("kube.test/v1", "Pear", kube_namespace)
    assert (await leader.apply(PEARS, body))["spec"] == {"size": 1}


async def test_nothing_is_sent_for_an_unchanged_object_and_drift_is_still_seen(
    client: Client, pears: KubeApi, kube_namespace: str
) -> None:
    applier = Applier(client)
    body = pear("a", kube_namespace, size=1)

    async def live() -> dict[str, Any]:
        return await client.get(PEARS, "a", kube_namespace)

    assert (await applier.apply(PEARS, body)).changed
    assert not (await applier.apply(PEARS, body, live=await live())).changed
    assert client.stats.writes_skipped == 1
    pears.apply(pear("a", size=5), namespace=kube_namespace)
    corrected = await applier.apply(PEARS, body, live=await live())
    assert corrected.changed
    assert corrected.object is not None
    assert corrected.object["spec"] == {"size": 1}
    # What its own controller says of it is no drift; a label is, and so is a spec that comes with a status.
    said = pears.set_status(await live(), phase="Ripe")
    assert not (await applier.apply(PEARS, body, live=said)).changed
    assert client.stats.writes_skipped == 2
    pears.set_status(said, phase="Rotten")
    pears.apply({**pear("a", size=7), "metadata": {"name": "a", "labels": {"a": "b"}}}, namespace=kube_namespace)
    corrected = await applier.apply(PEARS, body, live=await live())
    assert corrected.object is not None
    assert (corrected.object["spec"], corrected.object["status"]) == ({"size": 1}, {"phase": "Rotten"})
    assert (await applier.apply(PEARS, pear("a", kube_namespace, size=2), live=await live())).changed
    assert await applier.delete(PEARS, "a", kube_namespace)
    assert not await applier.delete(PEARS, "a", kube_namespace)
    assert (await applier.apply(PEARS, body)).changed


async def test_racing_writers_of_one_object_all_get_through_by_reading_again(
    client: Client, kube_namespace: str
) -> None:
    await client.create(CONFIG_MAPS, {"metadata": {"name": "c", "namespace": kube_namespace}, "data": {"n": "0"}})
    conflicts = 0

    async def count() -> None:
        nonlocal conflicts
        while True:
            found = await client.get(CONFIG_MAPS, "c", kube_namespace)
            found["data"]["n"] = str(int(found["data"]["n"]) + 1)
            try:
                await client.replace(CONFIG_MAPS, found)
            except ConflictError:
                conflicts += 1
            else:
                return

    await asyncio.gather(*(count() for _ in range(8)))
    assert (await client.get(CONFIG_MAPS, "c", kube_namespace))["data"] == {"n": "8"}
    assert conflicts > 0


def test_paths() -> None:
    assert PODS.path() == "/api/v1/pods"
    assert PODS.path("n", "p", "status") == "/api/v1/namespaces/n/pods/p/status"
    cluster = Resource("g.io", "v2", "things", "Thing", namespaced=False)
    assert cluster.path("ignored", "t") == "/apis/g.io/v2/things/t"
