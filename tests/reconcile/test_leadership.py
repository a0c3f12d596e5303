"""One writes, and only while the Lease is its own; another goes on from wherever it stopped."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.tcp_proxy import TcpProxy
from tests.reconcile.conftest import HASTY, Running, wait_for
from tests.reconcile.resources import MODEL, QUICKSTART, SINGLE, STORED_MODEL


async def test_the_other_takes_over_and_finishes_what_was_begun(room, actor, gateway):
    first, second = Running(room.api, room.namespace), Running(room.api, room.namespace, identity="second")
    await first.start()
    await first.leading()
    await second.start()
    try:
        room.apply(QUICKSTART)
        await room.until("PersistentVolumeClaim", "qwen-7b", lambda item: item)
        assert not second.writes()
        await first.stop()
        await second.leading()
        await room.phase("ArksApplication", "app-qwen", "Running")
        await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
        assert second.writes()
    finally:
        await first.stop()
        await second.stop()


async def test_a_leader_that_is_cut_off_writes_nothing_more_and_heals(room, actor):
    """Its connections are black-holed in the midst of its work; the other finishes, the first becomes a follower."""
    async with TcpProxy(room.api.port) as proxy:
        first = Running(room.api, room.namespace, identity="first", **HASTY)
        second = Running(room.api, room.namespace, identity="second")
        await first.start(server=proxy.url)
        await first.leading()
        await second.start()
        try:
            await asyncio.to_thread(room.apply, MODEL)
            await room.until("PersistentVolumeClaim", "qwen-7b", lambda item: item)
            proxy.black_hole()
            await second.leading()
            await asyncio.to_thread(room.apply, SINGLE)
            await room.phase("ArksApplication", "app-qwen", "Running")
            assert not first.controller.lease.is_leader
            sent = first.writes()
            proxy.heal()
            await asyncio.sleep(1.0)
            assert first.writes() == sent
            assert second.controller.lease.is_leader
        finally:
            await first.stop()
            await second.stop()


async def test_writes_that_meet_a_conflict_are_made_again(room, running, actor):
    """Somebody changes every object that we write, all the time."""
    room.apply(STORED_MODEL, SINGLE)
    stop = asyncio.Event()

    async def disturb():
        number = 0
        while not stop.is_set():
            number += 1
            for kind, name in (
                ("ArksApplication", "app-qwen"),
                ("ArksModel", "qwen-7b"),
                ("Service", "arks-application-app-qwen"),
                ("RoleBasedGroup", "app-qwen-0"),
            ):
                with_note = {"metadata": {"annotations": {"noise": str(number)}}}
                try:
                    await asyncio.to_thread(room.patch, kind, name, with_note)
                except Exception:
                    await asyncio.sleep(0)
            await asyncio.sleep(0.02)

    noise = asyncio.create_task(disturb())
    try:
        for tokens in ("1024", "2048", "4096"):
            change = {"spec": {"runtimeCommonArgs": ["--max-model-len", tokens]}}
            app = await asyncio.to_thread(room.patch, "ArksApplication", "app-qwen", change)

            def updated(item, generation=app["metadata"]["generation"]):
                status = item.get("status", {})
                return status.get("observedGeneration", 0) >= generation and status["updatedReplicas"] == 1

            await room.until("ArksApplication", "app-qwen", updated)
            await room.until("RoleBasedGroup", "app-qwen-0", lambda item, tokens=tokens: tokens in str(item["spec"]))
    finally:
        stop.set()
        await noise
    await room.phase("ArksApplication", "app-qwen", "Running")
    # Noise is no change of ours: an application that is noted every 20 ms is not written every 20 ms.
    assert running.writes().total() < 150


class Process:
    """`arks controller` as its own process."""

    def __init__(self, room, *flags: str) -> None:
        config = str(room.api.kubeconfig())
        command = [sys.executable, "-m", "arks", "controller", "--kubeconfig", config, "--namespace", room.namespace]
        self._process = subprocess.Popen(
            [*command, "--admin", "127.0.0.1:0", "--log-format", "json", *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("ARKS_R")},
        )
        self.admin = ""
        self.lines: list[str] = []

    def started(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if "controller started" in line:
                self.admin = json.loads(line)["admin"]
                return
        raise AssertionError("".join(self.lines))

    def get(self, path: str) -> tuple[int, str]:
        """(0, why) where it does not answer."""
        connection = http.client.HTTPConnection(self.admin, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError as error:
            return 0, str(error)
        finally:
            connection.close()

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self._process.poll() is not None:
            return self._process.returncode
        self._process.send_signal(number)
        assert self._process.stderr is not None
        self.lines += self._process.stderr.readlines()
        self._process.stderr.close()
        return self._process.wait(60)


@pytest.fixture
def processes():
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


async def test_the_process_serves_its_health_and_hands_over_when_it_is_stopped(room, processes, actor):
    process = Process(room)
    processes.append(process)
    await asyncio.to_thread(process.started)
    await wait_for(lambda: process.get("/readyz") == (200, "ok"))
    assert process.get("/healthz") == (200, "ok")
    room.apply(STORED_MODEL, SINGLE)
    await room.phase("ArksApplication", "app-qwen", "Running")
    metrics = process.get("/metrics")[1]
    assert "arks_controller_leader 1.0" in metrics
    assert 'arks_controller_objects{kind="ArksApplication"}' in metrics
    assert "process_resident_memory_bytes " in metrics
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in re.findall(r"^# TYPE (arks_\w+) ", metrics, re.MULTILINE):
        assert f"| `{name}` |" in documented
    assert await asyncio.to_thread(process.kill, signal.SIGTERM) == 0
    lease = room.get("Lease", "arks-controller")
    assert not lease["spec"].get("holderIdentity")
    assert "hf_" not in "".join(process.lines)


async def test_a_leader_killed_in_the_midst_is_followed_without_a_second_of_anything(room, processes, actor, gateway):
    """SIGKILL at several moments of the quickstart; the next one, started after the Lease ran out, finishes."""
    for number, moment in enumerate((0.0, 0.15)):
        process = Process(room)
        processes.append(process)
        await asyncio.to_thread(process.started)
        await wait_for(lambda process=process: "arks_controller_leader 1.0" in process.get("/metrics")[1])
        await asyncio.to_thread(room.apply, QUICKSTART if number == 0 else MODEL.replace("qwen-7b", "next"))
        await asyncio.sleep(moment)
        await asyncio.to_thread(process.kill)
        # Nobody is left to give it back: 15 s that the next leader would wait.
        room.delete("Lease", "arks-controller")
    last = Running(room.api, room.namespace)
    await last.start()
    try:
        await room.phase("ArksApplication", "app-qwen", "Running")
        await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
        assert len(room.list("RoleBasedGroup")) == 1
        owned = [job for job in room.list("Job") if job["metadata"]["name"] == "arks-worker-qwen-7b"]
        assert len(owned) == 1
    finally:
        await last.stop()
