"""From `kubectl apply` on a real API server to the decision of a real extproc process, and what a death does."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from extproc.snapshot import kept
from tests.defects.waiting import eventually
from tests.harness.gateway import on_this_machine
from tests.harness.kubernetes import KubeApi
from tests.snapshot_stream.conftest import CRDS, Tenant
from tests.snapshot_stream.data_plane import ADMITTED, asking, extproc
from tests.snapshot_stream.world import until

UNKNOWN = 401


class PublisherProcess:
    """The controller's end. `kill` and `start` are a crash and a restart."""

    def __init__(self, api: KubeApi, folder: Path) -> None:
        self._api, self.folder = api, folder
        self.address = f"unix:{folder / 'policy.sock'}"
        self._process: subprocess.Popen[str] | None = None

    def start(self, user: str = "admin") -> None:
        config = str(self._api.kubeconfig(user))
        command = [sys.executable, "-m", "tests.snapshot_stream.publishing", config, self.address]
        with (self.folder / "publisher.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == self.address, (self.folder / "publisher.log").read_text()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
def publisher(api: KubeApi, tmp_path: Path) -> Iterator[PublisherProcess]:
    found = PublisherProcess(api, tmp_path)
    found.start()
    yield found
    found.kill()


async def test_tokens_work_when_applied_and_fail_when_revoked_within_a_second(
    tenant: Tenant, publisher: PublisherProcess, tmp_path: Path
):
    tenant.endpoint()
    tenant.token("first", "sk-first")
    with extproc(tmp_path, publisher.address):
        async with asking(tmp_path) as decide:
            await decide.until("sk-first", ADMITTED)
            assert await decide("sk-second") == UNKNOWN
            took_s = []
            for turn in range(5):
                await asyncio.to_thread(tenant.token, "second", f"sk-second-{turn}")
                took_s.append(await decide.until(f"sk-second-{turn}", ADMITTED))
                if turn:
                    assert await decide(f"sk-second-{turn - 1}") == UNKNOWN, "a secret that was replaced still works"
            await asyncio.to_thread(tenant.delete, "ArksToken", "second")
            took_s.append(await decide.until("sk-second-4", UNKNOWN))
            await asyncio.to_thread(tenant.token, "first", "sk-first", disabled=True)
            took_s.append(await decide.until("sk-first", UNKNOWN))
            # Any one of them may meet a moment in which this machine stood still.
            assert statistics.median(took_s) < on_this_machine(1.0), took_s


async def test_a_token_in_a_secret_follows_the_secret(tenant: Tenant, publisher: PublisherProcess, tmp_path: Path):
    tenant.endpoint()
    tenant.token("sealed", tokenSecretRef={"name": "box", "key": "token"})
    with extproc(tmp_path, publisher.address):
        async with asking(tmp_path) as decide:
            assert await decide("sk-boxed") == UNKNOWN
            await asyncio.to_thread(tenant.secret, "box", token="sk-boxed\n")
            await decide.until("sk-boxed", ADMITTED)
            await asyncio.to_thread(tenant.secret, "box", token="sk-rotated")
            await decide.until("sk-rotated", ADMITTED)
            assert await decide("sk-boxed") == UNKNOWN
            await asyncio.to_thread(tenant.delete, "Secret", "box", "v1")
            await decide.until("sk-rotated", UNKNOWN)


async def test_a_dead_controller_stops_nothing_and_its_successor_knows_what_was_missed(
    tenant: Tenant, publisher: PublisherProcess, tmp_path: Path
):
    tenant.endpoint()
    tenant.token("stays", "sk-stays")
    tenant.token("goes", "sk-goes")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(extproc(tmp_path, publisher.address))
        async with asking(tmp_path) as decide:
            for secret in ("sk-stays", "sk-goes"):
                await decide.until(secret, ADMITTED)
            file, both = tmp_path / "state" / kept.FILE, {(tenant.namespace, name) for name in ("stays", "goes")}
            await until(lambda: file.exists() and kept.load(file)[0].tokens.keys() >= both)
            publisher.kill()
            await asyncio.to_thread(tenant.delete, "ArksToken", "goes")
            await asyncio.to_thread(tenant.token, "comes", "sk-comes")
            await _until_broken(first)
            assert await decide("sk-stays") == ADMITTED
            assert await decide("sk-goes") == ADMITTED, "nobody told it"
            before = await first.metric("arks_policy_age_seconds")
            await eventually(lambda: first.metric("arks_policy_age_seconds"), lambda age_s: age_s > before + 0.8)
            told = await first.readiness()
            assert told["status"] == 200
            assert told["current"] is False
            assert told["age_s"] > 0.8
        first.kill()
        second = stack.enter_context(extproc(tmp_path, publisher.address))
        async with asking(tmp_path) as decide:
            assert await decide("sk-stays") == ADMITTED, "a restart without the controller must serve"
            await eventually(lambda: second.metric("arks_policy_age_seconds"), lambda age_s: age_s > 1.0)
            publisher.start()
            await decide.until("sk-comes", ADMITTED)
            assert await decide("sk-goes") == UNKNOWN
            assert await decide("sk-stays") == ADMITTED
            await eventually(second.readiness, lambda told: told["current"] and told["age_s"] < 3.0)


async def _until_broken(process) -> None:
    await eventually(lambda: process.metric("arks_policy_broken"))


async def test_without_any_policy_it_waits_unready_and_can_be_stopped(tmp_path: Path):
    with extproc(tmp_path, f"unix:{tmp_path / 'nobody.sock'}") as process:
        await until(lambda: "cannot be followed" in (tmp_path / "extproc.log").read_text())
        assert not (tmp_path / "extproc.sock").exists(), "it listens and would call every token unknown"
        process.process.terminate()
        assert await asyncio.to_thread(process.process.wait, 60) == 0


async def test_an_api_server_away_is_told_as_age(own_kube_api: KubeApi, tmp_path: Path):
    own_kube_api.apply(CRDS)
    tenant = Tenant(own_kube_api, "default")
    tenant.endpoint()
    tenant.token("first", "sk-first")
    publisher = PublisherProcess(own_kube_api, tmp_path)
    publisher.start()
    try:
        with extproc(tmp_path, publisher.address) as process:
            async with asking(tmp_path) as decide:
                await decide.until("sk-first", ADMITTED)
                await asyncio.to_thread(own_kube_api.stop)
                # The stream lives, what it tells is old.
                await eventually(lambda: process.metric("arks_policy_age_seconds"), lambda age_s: age_s > 1.2)
                assert await decide("sk-first") == ADMITTED
                await asyncio.to_thread(own_kube_api.start)
                await asyncio.to_thread(tenant.token, "second", "sk-second")
                await decide.until("sk-second", ADMITTED)
                assert await decide("sk-first") == ADMITTED
    finally:
        publisher.kill()
