"""A kind to watch, clients that close themselves, and an API server that may be broken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from controller.kube.client import Client
from controller.kube.credentials import Credentials, from_kubeconfig
from controller.kube.resource import Key, Resource
from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import KubeApi

PEARS = Resource("kube.test", "v1", "pears", "Pear")
PEAR_CRD: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "pears.kube.test"},
    "spec": {
        "group": "kube.test",
        "scope": "Namespaced",
        "names": {"plural": "pears", "singular": "pear", "kind": "Pear"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {
                                    "size": {"x-kubernetes-preserve-unknown-fields": True},
                                    "color": {"type": "string", "maxLength": 20},
                                    "text": {"type": "string"},
                                },
                            },
                            "status": {"type": "object", "properties": {"phase": {"type": "string"}}},
                        },
                    }
                },
            }
        ],
    },
}


class PearSpec(msgspec.Struct):
    size: int = 0
    color: str = ""


class Pear(msgspec.Struct):
    spec: PearSpec


def pear(name: str, namespace: str = "", **spec: Any) -> dict[str, Any]:
    meta = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": "kube.test/v1", "kind": "Pear", "metadata": meta, "spec": spec}


class Changes:
    """What a reflector reported, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []  # name, what happened

    def __call__(self, key: Key, new: Any, old: Any) -> None:
        what = "deleted" if new is None else "added" if old is None else "modified"
        self.seen.append((key.name, what))

    def of(self, name: str) -> list[str]:
        return [what for who, what in self.seen if who == name]


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait for what the other side of a real network will make true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what happens on a server sets no event here
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(*mains: Callable[[], Awaitable[None]]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks for the length of a block; one that fails early is an error."""

    async def call(main: Callable[[], Awaitable[None]]) -> None:
        await main()

    tasks = [asyncio.create_task(call(main)) for main in mains]
    try:
        yield tasks
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def _plain_log() -> Iterator[None]:
    """Tracebacks of failures that are part of a test need no decoration; it costs half a second each."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def pears(kube_api: KubeApi) -> KubeApi:
    kube_api.apply(PEAR_CRD)
    return kube_api


@pytest.fixture(scope="module")
def fragile() -> Iterator[KubeApi]:
    """An API server for a module of tests that break it; each leaves it running."""
    try:
        with KubeApi() as api:
            api.apply(PEAR_CRD)
            yield api
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")


Connect = Callable[..., Awaitable[Client]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """`await connect(kubeconfig or credentials)`: a client that is closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def connected(to: Path | Credentials, **options: Any) -> Client:
            credentials = from_kubeconfig(str(to)) if isinstance(to, Path) else to
            return await stack.enter_async_context(Client(credentials, **options))

        yield connected
