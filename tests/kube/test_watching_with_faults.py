"""A watch survives what clusters do: restarts, forgotten history, freezes, dead connections, refusals, lost rights."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from controller.kube.client import Client, decoder
from controller.kube.credentials import from_kubeconfig
from controller.kube.errors import ForbiddenError, TooManyRequestsError, UnauthorizedError, UnavailableError
from controller.kube.reflector import Reflector
from controller.kube.resource import Key
from tests.harness.kubernetes import KubeApi
from tests.harness.rights import until_allowed
from tests.harness.tcp_proxy import TcpProxy
from tests.kube.conftest import PEARS, Changes, Connect, Pear, pear, running, until


@pytest.fixture
def namespace(fragile: KubeApi) -> Iterator[str]:
    name = fragile.create_namespace()
    yield name
    fragile.remove_namespace(name)


@contextlib.asynccontextmanager
async def watching(
    client: Client, namespace: str, changes: Changes, **options: float
) -> AsyncIterator[Reflector[Pear]]:
    """A reflector that is synced; it must still run at the end."""
    reflector = Reflector(client, PEARS, decoder(Pear), namespace=namespace, on_change=changes, **options)  # type: ignore[arg-type]
    async with running(reflector.run):
        await asyncio.wait_for(reflector.synced.wait(), 60)
        yield reflector


async def test_a_restart_re_emits_nothing_and_the_next_change_arrives(
    fragile: KubeApi, namespace: str, connect: Connect
) -> None:
    fragile.apply(pear("a", size=1), pear("b", size=1), namespace=namespace)
    changes = Changes()
    client = await connect(fragile.kubeconfig())
    async with watching(client, namespace, changes):
        await asyncio.to_thread(fragile.restart)
        fragile.apply(pear("c", size=1), namespace=namespace)
        await until(lambda: changes.of("c"))
        assert changes.of("a") == changes.of("b") == ["added"]


async def test_a_deletion_that_history_has_forgotten_is_still_told(
    fragile: KubeApi, namespace: str, connect: Connect
) -> None:
    fragile.apply(*(pear(name, size=1) for name in ("gone", "kept", "changed", "again")), namespace=namespace)
    changes = Changes()
    async with TcpProxy(fragile.port) as proxy:
        client = await connect(fragile.kubeconfig(server=proxy.url))
        async with watching(client, namespace, changes, backoff_max_s=1.0) as reflector:
            proxy.refuse()
            fragile.delete("kube.test/v1", "Pear", "gone", namespace)
            fragile.delete("kube.test/v1", "Pear", "again", namespace)
            fragile.apply(pear("changed", size=2), pear("again", size=9), namespace=namespace)
            for n in range(20):
                fragile.apply(pear("noise", size=n), namespace=namespace)
            fragile.compact()
            await asyncio.to_thread(fragile.restart)
            proxy.heal()
            await until(lambda: changes.of("gone") == ["added", "deleted"])
            await until(lambda: changes.of("again") == ["added", "deleted", "added"])
            assert changes.of("changed") == ["added", "modified"]
            assert changes.of("kept") == ["added"]
            assert reflector.stats.gone == 1
            assert {key.name for key in reflector.store} == {"kept", "changed", "again", "noise"}


async def test_watching_with_freezes(fragile: KubeApi, namespace: str, connect: Connect) -> None:
    changes = Changes()
    client = await connect(fragile.kubeconfig())
    async with watching(client, namespace, changes, inactivity_s=1.5) as reflector:
        fragile.freeze()
        try:
            await until(lambda: reflector.stats.silences)
            assert reflector.age_s > 1.4
        finally:
            fragile.thaw()
        fragile.apply(pear("after", size=1), namespace=namespace)
        await until(lambda: changes.of("after"))
        await until(lambda: reflector.age_s < 1.0)


async def test_watching_through_a_black_hole(fragile: KubeApi, namespace: str, connect: Connect) -> None:
    changes = Changes()
    async with TcpProxy(fragile.port) as proxy:
        client = await connect(fragile.kubeconfig(server=proxy.url))
        async with watching(client, namespace, changes, inactivity_s=2.0) as reflector:
            proxy.black_hole(new=False)  # the watch is half open; a new connection would work
            fragile.apply(pear("one", size=1), namespace=namespace)
            await until(lambda: changes.of("one"))
            assert reflector.stats.silences > 0
            proxy.black_hole()  # nothing works any more
            fragile.apply(pear("two", size=1), namespace=namespace)
            await until(lambda: reflector.stats.errors >= 3)
            assert not changes.of("two")
            proxy.heal()
            await until(lambda: changes.of("two"))


async def test_a_reset_connection_is_replaced_at_once(fragile: KubeApi, namespace: str, connect: Connect) -> None:
    changes = Changes()
    async with TcpProxy(fragile.port) as proxy:
        client = await connect(fragile.kubeconfig(server=proxy.url))
        async with watching(client, namespace, changes) as reflector:
            for n in range(3):
                proxy.reset()
                fragile.apply(pear(f"p{n}", size=1), namespace=namespace)
                await until(lambda n=n: changes.of(f"p{n}"))  # type: ignore[misc]
                assert reflector.stats.errors == n + 1, "it took more than one try"
            assert reflector.stats.lists == 1


async def test_a_watch_that_was_opened_anew_has_heard_the_server(
    fragile: KubeApi, namespace: str, connect: Connect
) -> None:
    """Else an outage of two minutes would be one of three for liveness, where nothing happens after it."""
    async with TcpProxy(fragile.port) as proxy:
        client = await connect(fragile.kubeconfig(server=proxy.url))
        async with watching(client, namespace, Changes()) as reflector:
            await until(lambda: reflector.age_s > 1.0)
            proxy.reset()
            await until(lambda: reflector.age_s < 0.9)
            assert reflector.last_error is None
            assert reflector.stats.events == 0


async def test_rights_taken_away_and_given_back(fragile: KubeApi, namespace: str, connect: Connect) -> None:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "pears"},
        "rules": [{"apiGroups": ["kube.test"], "resources": ["pears"], "verbs": ["list", "watch"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "pears"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "pears"},
        "subjects": [{"kind": "User", "name": "u1", "apiGroup": "rbac.authorization.k8s.io"}],
    }
    fragile.apply(role, binding)
    until_allowed(fragile, "u1", verb="watch", group="kube.test", resource="pears")
    fragile.apply(pear("before", size=1), namespace=namespace)
    changes = Changes()
    async with TcpProxy(fragile.port) as proxy:
        client = await connect(fragile.kubeconfig("u1", server=proxy.url))
        async with watching(client, namespace, changes, backoff_max_s=0.5) as reflector:
            fragile.delete("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "pears")
            # Who watches already is not asked again, so the authorizer must have heard of it first.
            watching_pears = {"verb": "watch", "group": "kube.test", "resource": "pears"}
            await asyncio.to_thread(until_allowed, fragile, "u1", allowed=False, **watching_pears)
            proxy.reset()
            await until(lambda: isinstance(reflector.last_error, ForbiddenError))
            fragile.apply(pear("meanwhile", size=1), namespace=namespace)
            await until(lambda: reflector.stats.errors >= 3)
            assert reflector.outage_s > 0.1
            await until(lambda: reflector.age_s < 2.0)
            assert Key(namespace, "before") in reflector.store
            fragile.apply(binding)
            await until(lambda: changes.of("meanwhile"))
            await until(lambda: reflector.last_error is None)
            assert reflector.outage_s == 0.0
            assert changes.of("before") == ["added"]


async def test_a_rotated_token_is_read_again_without_a_restart(
    fragile: KubeApi, namespace: str, connect: Connect, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(fragile.token("admin"))
    changes = Changes()
    client = await connect(fragile.kubeconfig("file", credentials={"tokenFile": str(token_file)}))
    async with watching(client, namespace, changes, backoff_max_s=0.5) as reflector:
        await asyncio.to_thread(fragile.restart, token_overrides={"admin": "rotated"})
        await until(lambda: isinstance(reflector.last_error, UnauthorizedError))
        fragile.apply(pear("meanwhile", size=1), namespace=namespace)
        token_file.write_text("rotated\n")
        await until(lambda: changes.of("meanwhile"))
        await until(lambda: reflector.last_error is None)


async def test_a_server_without_streamed_lists_is_paged(connect: Connect) -> None:
    with KubeApi(flags=["--feature-gates=WatchList=false"]) as api:
        api.create_namespace()
        client = await connect(api.kubeconfig())
        from controller.kube.resource import NAMESPACES

        changes = Changes()
        reflector = Reflector(client, NAMESPACES, decoder(dict), on_change=changes, page=2)
        async with running(reflector.run):
            await asyncio.wait_for(reflector.synced.wait(), 60)
            assert Key("", "default") in reflector.store
            late = api.create_namespace("late")
            await until(lambda: changes.of(late))
        assert reflector.stats.errors == 0
        assert client.stats.calls["list", "", "namespaces", "200"] >= 3


class Scripted:
    """A server for what a real one will not do on demand: it answers from a list, then as the last entry says."""

    def __init__(self, *answers: web.Response | bytes) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[float, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        watch, initial = "watch" in request.query, "sendInitialEvents" in request.query
        self.asked.append((time.monotonic(), "initial" if initial else "watch" if watch else "list"))
        answer = self.answers.pop(0) if self.answers else b""
        if isinstance(answer, web.Response):
            return answer
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(answer)
        if not self.answers:
            await asyncio.sleep(3600)
        return response

    @contextlib.asynccontextmanager
    async def serving(self, folder: Path) -> AsyncIterator[Path]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        config = folder / "kubeconfig"
        config.write_text(
            '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],'
            f'"clusters": [{{"name": "k", "cluster": {{"server": "http://127.0.0.1:{port}"}}}}],'
            '"users": [{"name": "u", "user": {"token": "t"}}]}'
        )
        try:
            yield config
        finally:
            await runner.cleanup()


def refusal(status: int, retry_after: str = "") -> web.Response:
    return web.Response(status=status, text="no", headers={"Retry-After": retry_after} if retry_after else {})


SYNCED = (
    b'{"type":"ADDED","object":{"metadata":{"name":"a","namespace":"n","resourceVersion":"5"},"spec":{}}}\n'
    b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7","annotations":'
    b'{"k8s.io/initial-events-end":"true"}}}}\n'
)


@pytest.mark.parametrize(("status", "error"), [(429, TooManyRequestsError), (503, UnavailableError)])
async def test_a_busy_server_is_left_alone_as_long_as_it_asks(
    status: int, error: type[Exception], connect: Connect, tmp_path: Path
) -> None:
    server = Scripted(refusal(status, "1"), refusal(status), SYNCED)
    with capture_logs() as logs:
        async with server.serving(tmp_path) as config:
            await synced_after(error, await connect(config))
    first, second, third = (at for at, _ in server.asked)
    assert second - first >= 1.0
    assert third - second >= 0.1
    asked_s, own_s = (each["retry_in_s"] for each in logs if each["event"] == "watch broken")
    assert asked_s >= 1.0 > own_s


async def synced_after(error: type[Exception], client: Client) -> None:
    reflector = Reflector(client, PEARS, decoder(Pear))
    async with running(reflector.run):
        await until(lambda: reflector.last_error is not None)
        assert isinstance(reflector.last_error, error)
        await asyncio.wait_for(reflector.synced.wait(), 60)
        assert reflector.last_error is None


async def test_a_stream_refused_in_its_midst_falls_back_to_pages(connect: Connect, tmp_path: Path) -> None:
    refused = b'{"type":"ERROR","object":{"code":500,"message":"etcd: RequestWatchProgress is disabled"}}\n'
    page = web.json_response({"metadata": {"resourceVersion": "9"}, "items": [pear("a", "n", size=1)]})
    server = Scripted(refused, page, b"")
    async with server.serving(tmp_path) as config:
        reflector = Reflector(await connect(config), PEARS, decoder(Pear))
        async with running(reflector.run):
            await asyncio.wait_for(reflector.synced.wait(), 60)
            await until(lambda: len(server.asked) == 3)
    assert [what for _, what in server.asked] == ["initial", "list", "watch"]
    assert [key.name for key in reflector.store] == ["a"]
    assert reflector.stats.errors == 0


async def test_streams_that_end_at_once_are_not_spun_on(connect: Connect, tmp_path: Path) -> None:
    server = Scripted(SYNCED, *[b""] * 50)
    async with server.serving(tmp_path) as config:
        reflector = Reflector(await connect(config), PEARS, decoder(Pear))
        async with running(reflector.run):
            await until(lambda: len(server.asked) >= 6)
    times_s = [at for at, _ in server.asked]
    pauses_s = [after - before for before, after in itertools.pairwise(times_s)]
    assert sum(pauses_s[:5]) > 1.0, "it asked again at once"


async def test_bytes_split_anywhere_and_strange_frames_lose_nothing(connect: Connect, tmp_path: Path) -> None:
    class Slow(Scripted):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            text = SYNCED + b'{"type":"NEWS","object":{}}\n\n'
            for at in range(0, len(text), 7):
                await response.write(text[at : at + 7])
                await asyncio.sleep(0)
            await asyncio.sleep(3600)
            return response

    async with Slow().serving(tmp_path) as config:
        reflector = Reflector(await connect(config), PEARS, decoder(Pear))
        async with running(reflector.run):
            await asyncio.wait_for(reflector.synced.wait(), 60)
            await asyncio.sleep(0.05)
    assert [key.name for key in reflector.store] == ["a"]
    assert reflector.stats.errors == 0


async def test_no_server_at_all_is_waited_for(tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    async with Scripted().serving(tmp_path) as served:
        config.write_text(served.read_text())
    async with Client(from_kubeconfig(str(config))) as client:
        reflector = Reflector(client, PEARS, decoder(Pear), backoff_max_s=0.2)
        async with running(reflector.run):
            await until(lambda: reflector.stats.errors >= 4)
        assert not reflector.synced.is_set()
