"""The product as a user runs it: `arks up` with real Envoy, and simulated engines in processes of their own.

`running_gateway` and `running_engine` start one and stop it; all listens on free ports and keeps its state in the test's
test's own folder. Envoy's counters (`envoy_stats`) are the oracle for what ext_proc really exchanged.
"""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml


@dataclass
class Engine:
    """A simulated engine's process."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def faults(self, session: aiohttp.ClientSession, **faults: Any) -> None:
        """Set faults at run time; none clears them."""
        async with session.post(f"{self.url}/sim/faults", json=faults) as answer:
            assert answer.status == 200, await answer.text()

    async def counter(self, session: aiohttp.ClientSession, name: str) -> float:
        """Sum of a metric's series."""
        async with session.get(f"{self.url}/metrics") as answer:
            return sum_series(await answer.text(), name)


@dataclass
class Gateway:
    """A running `arks up`."""

    url: str
    admin: str
    state: Path
    policy: Path
    process: subprocess.Popen[str]
    stderr: Path
    envoy_pid: int = 0
    extproc_pid: int = 0
    _stats: dict[str, int] = field(default_factory=dict)

    def find_children(self) -> None:
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"extproc\0--listen" in command:
                    self.extproc_pid = int(child)
                elif b"envoy.json" in command:
                    self.envoy_pid = int(child)

    def usage(self) -> list[dict[str, Any]]:
        """The ledger's rows in the order of admission, as `arks usage --json` prints them."""
        command = [sys.executable, "-m", "arks", "usage", "--state", str(self.state), "--json"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [json.loads(line) for line in out.splitlines()]

    async def rows(self, count: int, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The rows once there are at least `count`: the journal writes within 100 ms, a disconnect takes a moment."""
        async with asyncio.timeout(timeout_s):
            while True:
                if self._count() >= count:
                    return self.usage()
                await asyncio.sleep(0.05)

    def _count(self) -> int:
        with contextlib.closing(sqlite3.connect(f"file:{self.state / 'arks.db'}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM usage").fetchone()[0])

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self.admin}/metrics") as answer:
            return await answer.text()

    async def ready(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"{self.admin}/readyz") as answer:
            return {"status": answer.status, **await answer.json()}

    async def envoy_stats(self, pattern: str) -> dict[str, int]:
        """Envoy's own counters whose names match the expression."""
        address = (self.state / "envoy-admin").read_text().strip().removeprefix("unix:")
        connector = aiohttp.UnixConnector(address)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get("http://envoy/stats", params={"filter": pattern, "format": "json"}) as answer,
        ):
            stats = (await answer.json(content_type=None))["stats"]
            return {one["name"]: one["value"] for one in stats if "name" in one}

    def log(self) -> str:
        return self.stderr.read_text()

    def write_policy(self, text: str, name: str = "policy.yaml") -> None:
        """Replace a file of the policy folder at once, as a careful writer does."""
        hidden = self.policy / f".{name}.new"
        hidden.write_text(text)
        hidden.replace(self.policy / name)


def sum_series(metrics: str, name: str) -> float:
    """The sum of a metric's series in a text exposition."""
    total = 0.0
    for line in metrics.splitlines():
        head, _, value = line.rpartition(" ")
        if head == name or head.startswith(name + "{"):
            total += float(value)
    return total


def token(
    name: str,
    secret: str | None,
    endpoints: Sequence[str] = ("qwen-7b",),
    *,
    rates: dict[str, int] | None = None,
    quota: str | None = None,
    **spec: Any,
) -> str:
    """An ArksToken document."""
    limits = [{"type": kind, "value": value} for kind, value in (rates or {}).items()]
    qos = [
        {"arksEndpoint": {"name": one}, "rateLimits": limits} | ({"quota": {"name": quota}} if quota else {})
        for one in endpoints
    ]
    whole = {"qos": qos, **({"token": secret} if secret else {}), **spec}
    return document("ArksToken", name, whole)


def endpoint(name: str = "qwen-7b", **spec: Any) -> str:
    """An ArksEndpoint document."""
    return document("ArksEndpoint", name, {"defaultWeight": 1, "gatewayRef": {"name": "arks-eg"}, **spec})


def quota(name: str, **values: int) -> str:
    """An ArksQuota document, of prompt=, response=, total=."""
    return document("ArksQuota", name, {"quotas": [{"type": kind, "value": value} for kind, value in values.items()]})


def backend(name: str, *addresses: str) -> str:
    """An Envoy Gateway Backend document, for an endpoint's routeConfigs."""
    endpoints = []
    for one in addresses:
        host, _, port = one.rpartition(":")
        endpoints.append({"ip": {"address": host, "port": int(port)}})
    kind = {"apiVersion": "gateway.envoyproxy.io/v1alpha1", "kind": "Backend"}
    return yaml.safe_dump(
        {**kind, "metadata": {"name": name, "namespace": "default"}, "spec": {"endpoints": endpoints}}
    )


def route(name: str, weight: int) -> dict[str, Any]:
    """One of an endpoint's routeConfigs, naming a `backend`."""
    return {"group": "gateway.envoyproxy.io", "kind": "Backend", "name": name, "weight": weight}


def document(kind: str, name: str, spec: dict[str, Any], namespace: str = "default") -> str:
    meta = {"name": name, "namespace": namespace}
    return yaml.safe_dump({"apiVersion": "arks.ai/v1", "kind": kind, "metadata": meta, "spec": spec})


def policy(*documents: str) -> str:
    return "---\n".join(documents)


def environment() -> dict[str, str]:
    """Coverage follows into child processes where the suite measures it."""
    return {**os.environ, "ARKS_TEST": "1"}


@contextlib.contextmanager
def running_engine(*flags: str, model: str = "qwen-7b", listen: str = "127.0.0.1:0") -> Iterator[Engine]:
    command = [sys.executable, "-m", "simengine", "--listen", listen, "--model", model, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield Engine(json.loads(process.stdout.readline())["url"], process)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def running_gateway(folder: Path, text: str | None, engines: Sequence[Engine | str], *flags: str) -> Iterator[Gateway]:
    """`arks up` under this policy text (None: the folder's policy as it stands) with these default engines."""
    folder.mkdir(parents=True, exist_ok=True)
    policies, state = folder / "policy", folder / "state"
    policies.mkdir(exist_ok=True)
    if text is not None:
        (policies / "policy.yaml").write_text(text)
    urls = [one.url if isinstance(one, Engine) else one for one in engines]
    command = [
        *(sys.executable, "-m", "arks", "up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
        *("--policy", str(policies), "--state", str(state), "--access-log", str(folder / "access.log"), *flags),
        *(part for url in urls for part in ("--engine", url)),
    ]
    stderr = folder / "stderr"
    with stderr.open("ab") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True, env=environment())
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"arks up ended with {process.wait()}:\n{stderr.read_text()[-3000:]}")
        ready = json.loads(line)
        gateway = Gateway(ready["gateway"], ready["admin"], state, policies, process, stderr)
        gateway.find_children()
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
