"""A load in this process or in one of its own, and the servers that it loads from."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import replace

import msgspec
import pytest

from controller.models.loading import Loading
from controller.models.progress import Progress
from controller.models.report import parse_report
from controller.models.request import Settings, decode_request
from tests.harness.go_build import NoGoError
from tests.models import s3_server
from tests.models.hubs import Hub, Scope

FAST = Settings(
    piece_bytes=256 << 10,
    write_bytes=64 << 10,
    backoff_first_s=0.001,
    backoff_longest_s=0.01,
    report_every_s=0.5,
    silence_timeout_s=30.0,
    margin_bytes=0,
    lock_poll_s=0.02,
    lock_silence_s=0.3,
)


def pytest_collection_finish(session):
    """Build before the first test: minutes of compiling are no test's time limit."""
    if not session.config.option.collectonly and any("s3_server" in item.fixturenames for item in session.items):
        with contextlib.suppress(NoGoError):  # the tests say so
            s3_server.program()


class Loader:
    """``volume`` is the mount; targets are below it."""

    def __init__(self, volume):
        self.volume = volume
        self.lines = []
        self.environment = {}
        self.processes = []

    def argument(self, source, folder="model", model="org/model"):
        return json.dumps({"model": model, "path": str(self.volume / folder), "source": source})

    async def __call__(self, source, folder="model", model="org/model", environment=None, **settings):
        told = replace(FAST, mount=str(self.volume), **settings)
        request = decode_request(self.argument(source, folder, model))
        progress = Progress(request.model, request.kind, self.lines.append)
        self.progress = progress
        async with asyncio.timeout(120), progress.telling(told.report_every_s):
            return await Loading(request, told, environment or self.environment, progress).run()

    async def process(self, source, folder="model", environment=None, **more):
        env = {
            "PATH": os.environ["PATH"],
            "ARKS_MODELS_MOUNT": str(self.volume),
            "ARKS_LOADER_PIECE_BYTES": str(FAST.piece_bytes),
            "ARKS_LOADER_MARGIN_BYTES": "0",
            "ARKS_LOADER_BACKOFF_S": "0.01",
            "ARKS_LOADER_REPORT_S": "0.2",
            **(environment or {}),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "controller.models",
            self.argument(source, folder),
            env=env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            **more,
        )
        self.processes.append(process)
        return process

    async def end(self):
        """What a failed test left running."""
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    def marker(self, folder="model"):
        path = self.volume / folder / ".arks-ready.json"
        return json.loads(path.read_text()) if path.exists() else None

    def status(self, folder="model"):
        return parse_report((self.volume / folder / ".arks-status.json").read_text())

    def files(self, folder="model"):
        root = self.volume / folder
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and not any(part.startswith(".arks-") for part in path.relative_to(root).parts)
        }

    def said(self):
        """Everything that this loader let out, to look for secrets in."""
        told = "\n".join(self.lines)
        for path in self.volume.rglob(".arks-*"):
            if path.is_file():
                told += path.read_text(errors="replace")
        return told + repr(msgspec.json.encode(self.progress.report()))


@pytest.fixture
async def loader(tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    loader = Loader(volume)
    yield loader
    await loader.end()


@pytest.fixture
async def hub():
    server = await Hub().start()
    yield server
    await server.stop()


@pytest.fixture
async def scope():
    server = await Scope().start()
    yield server
    await server.stop()
