"""The folder changes in every way that editors, kubelets and people do it; what is in force stays whole."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator

import pytest

from apis.policy import Policy
from extproc.snapshot import folder as source
from extproc.snapshot.errors import PolicyErrors
from extproc.snapshot.folder import FolderSource
from extproc.snapshot.hosts import Hosts
from tests.snapshot.conftest import PolicyFolder, endpoint, token


class Following:
    def __init__(self, folder: PolicyFolder, **options) -> None:
        self.waited_s: list[float] = []
        self.policies: list[Policy] = []
        self.errors: list[PolicyErrors] = []
        self.happened = asyncio.Event()
        self.source = FolderSource(folder.path, self.take, self.fail, **options)

    def take(self, policy: Policy, notes) -> None:
        self.waited_s = list(getattr(source.asyncio, "asked_s", ()))
        self.policies.append(policy)
        self.happened.set()

    def fail(self, errors: PolicyErrors) -> None:
        self.errors.append(errors)
        self.happened.set()

    @property
    def rpm(self) -> int:
        return self.policies[-1].tokens["default", "alice"].grants[0].rates[0].value

    async def next(self) -> None:
        async with asyncio.timeout(60):
            await self.happened.wait()
        self.happened.clear()

    async def until_rpm(self, rpm: int) -> None:
        while ("default", "alice") not in self.policies[-1].tokens or self.rpm != rpm:
            await self.next()


class Waits:
    """Stands for asyncio in the source, and writes down how long its follower chose to wait."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []

    def __getattr__(self, name: str):
        return getattr(asyncio, name)

    def sleep(self, delay_s: float):
        self._note(delay_s)
        return asyncio.sleep(delay_s)

    def timeout(self, delay_s: float):
        self._note(delay_s)
        return asyncio.timeout(delay_s)

    def _note(self, delay_s: float) -> None:
        task = asyncio.current_task()
        # The source's other tasks wait for host names and for file events.
        if task is not None and not task.get_name().startswith("policy folder"):
            self.asked_s.append(delay_s)


@contextlib.asynccontextmanager
async def following(folder: PolicyFolder, **options) -> AsyncIterator[Following]:
    seen = Following(folder, **options)
    await seen.source.start()
    seen.happened.clear()
    run = asyncio.create_task(seen.source.run())
    await asyncio.sleep(0.05)
    try:
        yield seen
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run


async def test_a_first_start_with_a_fault_refuses(folder):
    folder.write("t.yaml", token(rpm=-1))
    seen = Following(folder)
    with pytest.raises(PolicyErrors):
        await seen.source.run()
    assert seen.policies == []
    assert not seen.source.status.ok
    assert seen.source.status.errors[0].line == 12


async def test_a_change_applies(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        folder.write("t.yaml", endpoint(), token(rpm=6))
        await seen.next()
        assert seen.rpm == 6
        assert seen.source.status.generation == 2


async def test_file_events_alone_bring_a_change(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder, poll_s=3600.0) as seen, asyncio.timeout(60):
        while not seen.happened.is_set():  # the watch may not have begun
            folder.write("t.yaml", endpoint(), token(rpm=6))
            await asyncio.sleep(0.2)
        assert seen.rpm == 6


@pytest.mark.parametrize("moving", [False, True])
async def test_without_file_events_a_change_applies_within_a_second(folder, monkeypatch, moving):
    """By what the source waits for, not by how long it took: how soon it runs is the machine's."""

    async def no_events(*_, **__):
        raise OSError("no space left for watches")
        yield

    waits = Waits()
    monkeypatch.setattr(source, "awatch", no_events)
    monkeypatch.setattr(source, "asyncio", waits)
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        look = seen.source._folder.signature

        def moved():
            folder.write("notes.yaml", "# another\n" * len(waits.asked_s))
            return look()

        if moving:
            seen.source._folder.signature = moved
        waits.asked_s.clear()
        folder.write("t.yaml", endpoint(), token(rpm=6))
        await seen.until_rpm(6)
        poll_s = seen.source._poll_s
        asked_s = seen.waited_s
    # One look may have begun just before the change, and one wait have been under way.
    assert asked_s.count(poll_s) <= 1
    assert poll_s + sum(each for each in asked_s if each != poll_s) <= 1.0


async def test_a_broken_file_keeps_the_last_good_state_and_is_told_once(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        folder.write("t.yaml", endpoint(), token(rpm=-6))
        await seen.next()
        assert len(seen.errors) == 1
        assert len(seen.policies) == 1
        assert not seen.source.status.ok
        assert seen.source.status.errors[0].path == "spec.qos[0].rateLimits[0].value"
        assert seen.source.status.generation == 1
        folder.write("t.yaml", endpoint(), token(rpm=7))
        await seen.next()
        assert seen.rpm == 7
        assert seen.source.status.ok
        assert seen.source.status.errors == ()


async def test_mending_a_file_back_to_what_is_in_force_is_ready_again(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        folder.write("t.yaml", "[")
        await seen.next()
        folder.write("t.yaml", endpoint(), token(rpm=5))
        async with asyncio.timeout(60):
            while not seen.source.status.ok:  # noqa: ASYNC110 - readiness is polled, as a probe does
                await asyncio.sleep(0.01)
        assert len(seen.policies) == 1


async def test_an_editor_that_renames_over_the_file_is_followed(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        for rpm in (6, 7):
            folder.write("t.yaml.new", endpoint(), token(rpm=rpm)).rename(folder.path / "t.yaml")
            await seen.next()
            assert seen.rpm == rpm


async def test_a_config_map_volume_is_followed(folder):
    # The kubelet's way: files are links through ..data, which is renamed over to point at a new directory.
    def publish(version: int) -> None:
        target = folder.path / f"..version_{version}"
        target.mkdir()
        (target / "t.yaml").write_text(endpoint() + "---\n" + token(rpm=version))
        (folder.path / "..data_tmp").symlink_to(target.name)
        (folder.path / "..data_tmp").rename(folder.path / "..data")

    publish(5)
    (folder.path / "t.yaml").symlink_to("..data/t.yaml")
    async with following(folder) as seen:
        publish(6)
        await seen.next()
        assert seen.rpm == 6
        shutil.rmtree(folder.path / "..version_5")
        publish(7)
        await seen.next()
        assert seen.rpm == 7


async def test_a_folder_that_goes_and_comes_back_is_followed_again(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        shutil.rmtree(folder.path)
        await seen.next()
        if not seen.errors:  # seen empty before it was gone
            await seen.next()
        assert "cannot be listed" in str(seen.errors[-1])
        folder.path.mkdir()
        folder.write("t.yaml", endpoint(), token(rpm=6))
        await seen.until_rpm(6)
        await asyncio.sleep(0.6)
        folder.write("t.yaml", endpoint(), token(rpm=7))
        await seen.until_rpm(7)


async def test_a_file_being_written_is_read_when_it_stands_still(folder, monkeypatch):
    monkeypatch.setattr(source, "_STILL_LIMIT_S", 3600.0)
    parts = iter((endpoint(), "---\n", token(rpm=6), "---\n", token("bob", "sk-bob")))
    folder.write("t.yaml", endpoint(), token(rpm=5), token("bob", "sk-bob"))
    async with following(folder) as seen:
        look = seen.source._folder.signature
        with (folder.path / "t.yaml").open("w") as file:

            def written_on():
                """Each look finds more of it."""
                file.write(next(parts, ""))
                file.flush()
                return look()

            seen.source._folder.signature = written_on
            await seen.next()
        assert [len(policy.tokens) for policy in seen.policies] == [2, 2]
        assert seen.rpm == 6


async def test_a_file_written_without_end_is_read_all_the_same(folder):
    folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen, asyncio.timeout(60):
        count = 0
        while not seen.happened.is_set():
            count += 1
            folder.write("t.yaml.new", endpoint(), token(rpm=6 + count)).rename(folder.path / "t.yaml")
            await asyncio.sleep(0.01)
        assert seen.rpm > 5


async def test_touching_a_file_publishes_nothing(folder):
    file = folder.write("t.yaml", endpoint(), token(rpm=5))
    async with following(folder) as seen:
        file.touch()
        folder.write("notes.txt", "x")
        await asyncio.sleep(0.8)
        assert len(seen.policies) == 1


_BACKEND = """\
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: be}
spec: {endpoints: [{fqdn: {hostname: engine.example, port: 80}}]}
"""
_ROUTE = "  routeConfigs: [{group: gateway.envoyproxy.io, kind: Backend, name: be}]\n"


async def test_host_names_become_addresses_and_survive_a_failing_resolver(folder, monkeypatch):
    monkeypatch.setattr("extproc.snapshot.folder.REFRESH_S", 0.02)
    answers: list[tuple[str, ...] | OSError] = [("10.0.0.1:80",)]

    async def lookup(host: str, port: int) -> tuple[str, ...]:
        assert (host, port) == ("engine.example", 80)
        if isinstance(answers[0], OSError):
            raise answers[0]
        return answers[0]

    def addresses() -> tuple[str, ...]:
        return seen.policies[-1].endpoints["default", "qwen"].routes[0].addresses

    folder.write("e.yaml", endpoint(extra=_ROUTE), _BACKEND)
    async with following(folder, hosts=Hosts(lookup)) as seen:
        assert addresses() == ("10.0.0.1:80",)
        answers[0] = ("10.0.0.1:80", "10.0.0.2:80")
        await seen.next()
        assert addresses() == ("10.0.0.1:80", "10.0.0.2:80")
        answers[0] = OSError(-2, "Name or service not known")
        await seen.next()
        assert addresses() == ("10.0.0.1:80", "10.0.0.2:80")
        assert "engine.example:80 cannot be resolved: Name or service not known" in seen.source.status.notes[0].text


async def test_a_host_that_never_answers_holds_nothing_up(folder, monkeypatch):
    monkeypatch.setattr("extproc.snapshot.hosts.TIMEOUT_S", 0.05)

    async def lookup(host: str, port: int) -> tuple[str, ...]:
        await asyncio.Event().wait()
        raise AssertionError

    folder.write("e.yaml", endpoint(extra=_ROUTE), _BACKEND, token())
    async with following(folder, hosts=Hosts(lookup)) as seen:
        assert seen.policies[-1].endpoints["default", "qwen"].routes[0].addresses == ()
        assert "no answer within" in seen.source.status.notes[0].text


async def test_localhost_is_resolved_by_the_system(folder):
    folder.write("e.yaml", endpoint(extra=_ROUTE), _BACKEND.replace("engine.example", "localhost"))
    async with following(folder) as seen:
        assert "127.0.0.1:80" in seen.policies[-1].endpoints["default", "qwen"].routes[0].addresses
