"""The cluster: the tests' API server and etcd, started as a process, which also tells what the controller wrote.

`tests.harness.cluster` is started, not imported: the rooms of the product import nothing of the tests.
"""

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import yaml

Object = dict[str, Any]
WRITERS = 24
PAGE = 500
_TYPES = {"PATCH": "application/merge-patch+json"}


class Call(NamedTuple):
    """One write."""

    method: str
    path: str
    body: Object | None = None


def path(api_version: str, plural: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    scope = f"/namespaces/{namespace}" if namespace else ""
    return root + scope + "".join(f"/{part}" for part in (plural, name, subresource) if part)


class Writes(NamedTuple):
    """What the controller's account wrote: how often by "VERB RESOURCE[/SUBRESOURCE]", and when last (Unix time)."""

    counts: Counter[str]
    """without the Lease's renewals"""
    renewals: int
    last_s: float


class Cluster:
    """A running one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        users = self._answer()
        self.admin: Mapping[str, Any] = yaml.safe_load(Path(users["admin"]).read_text())
        """an administrator's kubeconfig"""
        self.controller = Path(users["controller"])
        """file of its service account's kubeconfig; the rights are those of manifests/base/rbac.yaml"""

    def new_writes(self) -> Writes:
        """Since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        counts = Counter[str](answer["writes"])
        renewals = sum(counts.pop(what) for what in list(counts) if what.endswith(" leases"))
        return Writes(counts, renewals, answer["last_s"] or 0.0)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the API server's process has ended (see above)")
        return json.loads(line)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Minutes where the API server was never built on this machine, else seconds."""
    # A Service for every application: more than the tests' range of addresses holds.
    command = [sys.executable, "-m", "tests.harness.cluster", "--service-cluster-ip-range=10.96.0.0/16"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Cluster(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


class Api:
    """Requests as a kubeconfig's user."""

    def __init__(self, session: aiohttp.ClientSession, server: str, tls: ssl.SSLContext) -> None:
        self._session, self._server, self._tls = session, server, tls

    async def request(
        self, method: str, path: str, body: Object | None = None, params: Mapping[str, str] | None = None
    ) -> Any:
        """The answer; raises RuntimeError from 400 on."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": _TYPES.get(method, "application/json")}
        sent = self._session.request(
            method, self._server + path, data=data, headers=headers, params=params, ssl=self._tls
        )
        async with sent as answer:
            text = await answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:500].decode(errors='replace')}")
            return json.loads(text)

    async def items(self, path: str, params: Mapping[str, str] | None = None) -> list[Object]:
        """A whole list, page by page."""
        found: list[Object] = []
        token = ""
        while True:
            asked = {"limit": str(PAGE), **(params or {}), **({"continue": token} if token else {})}
            page = await self.request("GET", path, params=asked)
            found += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return found

    async def write(self, calls: Iterable[Call]) -> None:
        """Many, in about their order."""
        left = iter(calls)

        async def writer() -> None:
            for call in left:
                await self.request(call.method, call.path, call.body)

        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(writer())


@contextlib.asynccontextmanager
async def api(config: Mapping[str, Any]) -> AsyncIterator[Api]:
    """`config`: a kubeconfig's content."""
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
    headers = {"Authorization": f"Bearer {user['token']}"}
    connector = aiohttp.TCPConnector(limit=WRITERS + 4)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        yield Api(session, cluster["server"], tls)
