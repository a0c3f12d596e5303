"""The product as a user runs it: `arks up` with real Envoy, and simulated engines in processes of their own.

`running_gateway` and `running_engine` start one and stop it; all listens on free ports and keeps its state in the
test's own folder. Envoy's counters are the oracle for what ext_proc really exchanged: `running_gateway` ends with a
look at those that count a misuse of the protocol (`EXT_PROC_FAULTS`).
"""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from arks import usage

EXT_PROC_FAULTS = (
    "spurious_msgs_received",
    "rejected_header_mutations",
    "message_timeouts",
    "failure_mode_allowed",
    "streams_failed",
    "immediate_responses_ignored",
    "invalid_content_length",
    "http_not_ok_resp_received",
)
"""Envoy's counters of what extproc did wrong, or of its absence. All zero unless the test made it so."""


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

    async def recorded(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        """The requests that arrived since the last call, oldest first; `body` as bytes. Needs --record."""
        async with session.delete(f"{self.url}/sim/requests") as answer:
            found = await answer.json()
        return [{**one, "body": base64.b64decode(one["body_base64"]), "headers": dict(one["headers"])} for one in found]

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
    tolerated: set[str] = field(default_factory=set)
    """EXT_PROC_FAULTS that a test causes on purpose"""

    def find_children(self) -> None:
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            # Threads and processes may end while we look.
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text().split():
                    self._know(int(child))

    def _know(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"extproc\0--listen" in command:
                self.extproc_pid = pid
            elif b"envoy.json" in command:
                self.envoy_pid = pid

    def usage(self, limit: int = 100_000) -> list[dict[str, Any]]:
        """The ledger's rows in the order of admission, as `arks usage --json` prints them."""
        out = io.StringIO()
        usage.run(usage.UsageSettings(self.state, True, None, None, None, None, limit), out)
        return [json.loads(line) for line in out.getvalue().splitlines()]

    async def rows(self, count: int, timeout_s: float = 60.0) -> list[dict[str, Any]]:
        """The rows once there are at least `count`: the journal writes within 100 ms, a disconnect takes a moment."""
        await until(lambda: self.count() >= count, timeout_s)
        return self.usage()

    async def rows_of(self, request_id: str, count: int = 1, timeout_s: float = 60.0) -> list[dict[str, Any]]:
        """The rows of one request, by attempt, once there are `count`."""
        await until(lambda: self.count(request_id) >= count, timeout_s)
        found = [row for row in self.usage() if row["request_id"] == request_id]
        assert len(found) == count, found
        return sorted(found, key=lambda row: int(row["attempt"]))

    async def row_of(self, request_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        return (await self.rows_of(request_id, 1, timeout_s))[0]

    def count(self, request_id: str | None = None) -> int:
        """Rows in the ledger's file now, without those of which the last word is still to come."""
        where = " WHERE error <> 'broken_off'" + ("" if request_id is None else " AND request_id = ?")
        with contextlib.closing(sqlite3.connect(f"file:{self.state / 'arks.db'}?mode=ro", uri=True)) as db:
            found = db.execute("SELECT count(*) FROM usage" + where, () if request_id is None else (request_id,))
            return int(found.fetchone()[0])

    def ext_proc_faults(self) -> dict[str, int]:
        """EXT_PROC_FAULTS that are not zero."""
        stats = self.stats("ext_proc")
        return {name: value for name, value in stats.items() if value and name.rpartition(".")[2] in EXT_PROC_FAULTS}

    def stats(self, pattern: str) -> dict[str, int]:
        """Envoy's own counters whose names match the expression."""
        address = (self.state / "envoy-admin").read_text().strip().removeprefix("unix:")
        connection = http.client.HTTPConnection("envoy", timeout=60)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection.sock:
            connection.sock.connect(address)
            connection.request("GET", f"/stats?format=json&filter={pattern}")
            stats = json.loads(connection.getresponse().read())["stats"]
        return {one["name"]: one["value"] for one in stats if "name" in one}

    @property
    def access_log(self) -> Path:
        return self.stderr.with_name("access.log")

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"{self.admin}/metrics") as answer:
            return await answer.text()

    async def metric(self, session: aiohttp.ClientSession, name: str) -> float:
        """Sum of a metric's series now."""
        return sum_series(await self.metrics(session), name)

    async def until_metric(
        self, session: aiohttp.ClientSession, name: str, holds: Callable[[float], bool], timeout_s: float = 60.0
    ) -> str:
        """The whole exposition once the metric's sum is as wanted. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not holds(sum_series(found := await self.metrics(session), name)):  # noqa: ASYNC110 - as in until
                await asyncio.sleep(0.02)
            return found

    def streams(self, what: str) -> int:
        """Envoy's count of ext_proc streams: started, closed, ..."""
        found = self.stats(f"ext_proc.*streams_{what}$")
        return sum(found.values())

    async def ready(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"{self.admin}/readyz") as answer:
            return {"status": answer.status, **await answer.json()}

    def log(self) -> str:
        return self.stderr.read_text()

    def write_policy(self, text: str, name: str = "policy.yaml") -> None:
        """Replace a file of the policy folder at once, as a careful writer does."""
        hidden = self.policy / f".{name}.new"
        hidden.write_text(text)
        hidden.replace(self.policy / name)


async def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll what another process does. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - nothing here could set an event
            await asyncio.sleep(0.03)


def past_midnight(margin_s: float = 60.0) -> None:
    """Daily windows are those of the clock (UTC): close before the end of one, wait for the next."""
    left_s = 86_400 - time.time() % 86_400
    if left_s < margin_s:
        time.sleep(left_s + 0.1)


def on_this_machine(bound_s: float) -> float:
    """What a bound of the product may take here: three times as long while others keep the processors busy."""
    return bound_s if os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1) else 3 * bound_s


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
    # Its connections stay as long as a test lasts: where an engine closes one just as Envoy uses it again, a request is
    # asked twice, and Envoy's second of margin is no more than a starved process loses.
    command = [sys.executable, "-m", "simengine", "--listen", listen, "--model", model]
    command += ["--keep-alive-timeout-s", "300", *flags]
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
        if process.poll() is None:
            faults = gateway.ext_proc_faults()
            assert {name.rpartition(".")[2] for name in faults} <= gateway.tolerated, faults
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
