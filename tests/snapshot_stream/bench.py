"""Figures of the policy stream on a real API server: `python -m tests.snapshot_stream.bench [TOKENS ENDPOINTS]`.

10 000 tokens and 1 000 endpoints (each with a Service and a slice) by default. The publisher is a process of its own;
extproc's end (`StreamSource`, `LiveIndex`) runs here, on uvloop, so that its loop's pauses can be seen by a task that
wakes every millisecond. A change's time runs from the API request to the moment at which the index decides by it.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from apis.policy import Policy
from controller.kube.client import Client
from controller.kube.credentials import from_kubeconfig
from controller.kube.resource import SERVICES
from controller.reconcile.kinds import ARKS
from controller.snapshot.publisher import ENDPOINT_SLICES
from extproc.snapshot.index import LiveIndex
from extproc.snapshot.stream import StreamSource
from tests.harness.kubernetes import KubeApi
from tests.snapshot.bench import Pauses, spread
from tests.snapshot_stream.conftest import CRDS

NAMESPACES, CHANGES = 50, 100
WRITERS = 16


def token(index: int, rpm: int = 5) -> dict:
    rates = [{"type": kind, "value": value} for kind, value in (("rpm", rpm), ("tpm", 100000), ("rpd", 100000))]
    qos = [{"arksEndpoint": {"name": f"model-{index % 20}"}, "rateLimits": rates, "quota": {"name": "basic"}}]
    meta = {"name": f"token-{index}", "namespace": f"team-{index % NAMESPACES}"}
    return {"metadata": meta, "spec": {"token": f"sk-{index}", "qos": qos}}


def endpoint(index: int) -> list[tuple]:
    meta = {"name": f"model-{index // NAMESPACES}", "namespace": f"team-{index % NAMESPACES}"}
    service = {**meta, "name": f"svc-{index}"}
    labels = {"kubernetes.io/service-name": f"svc-{index}"}
    ends = [{"addresses": [f"10.{index >> 8}.{index & 255}.{pod}"], "conditions": {"ready": True}} for pod in (1, 2)]
    part = {"addressType": "IPv4", "endpoints": ends, "ports": [{"name": "http", "port": 8080}]}
    routes = [{"name": f"svc-{index}", "port": 80}]
    return [
        (SERVICES, {"metadata": service, "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 80}]}}),
        (ENDPOINT_SLICES, {"metadata": {**service, "labels": labels}, **part}),
        (ARKS["ArksEndpoint"], {"metadata": meta, "spec": {"gatewayRef": {"name": "eg"}, "routeConfigs": routes}}),
    ]


async def filled(client: Client, tokens: int, endpoints: int) -> None:
    gate = asyncio.Semaphore(WRITERS)

    async def create(resource, body) -> None:
        async with gate:
            await client.create(resource, {"apiVersion": resource.api_version, "kind": resource.kind, **body})

    items = [item for index in range(endpoints) for item in endpoint(index)]
    items += [(ARKS["ArksToken"], token(index)) for index in range(tokens)]
    async with asyncio.TaskGroup() as group:
        for resource, body in items:
            group.create_task(create(resource, body))


class Process:
    """The publisher's process, and what it costs."""

    def __init__(self, config: Path, address: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "tests.snapshot_stream.publishing", str(config), address]
        self._log = log

    async def start(self) -> float:
        """Seconds until it tells the whole policy."""
        began = time.perf_counter()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        while (await self._process.stdout.readline()).strip() != b"ready":
            pass
        return time.perf_counter() - began

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


def percentiles(values_s: list[float]) -> str:
    values = sorted(value * 1000 for value in values_s)
    at = [values[min(len(values) - 1, int(len(values) * part))] for part in (0.5, 0.9, 0.99)]
    return f"p50 {at[0]:6.1f} ms   p90 {at[1]:6.1f} ms   p99 {at[2]:6.1f} ms   worst {values[-1]:6.1f} ms"


class Follower:
    """extproc's end: stream, index, and how it is swapped, as the process does it."""

    def __init__(self, address: str, folder: Path) -> None:
        self.live = LiveIndex()
        self._pending: Policy | None = None
        self._changed, self.swapped = asyncio.Event(), asyncio.Event()
        self.source = StreamSource(address, self._take, state_dir=folder)

    def _take(self, policy: Policy, _notes) -> None:
        self._pending = policy
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.live.apply(self._pending)
            self.swapped.set()

    def rpm(self, index: int) -> int | None:
        found = self.live.current.policy.tokens.get((f"team-{index % NAMESPACES}", f"token-{index}"))
        return None if found is None else found.grants[0].rates[0].value

    async def until(self, check) -> None:
        async with asyncio.timeout(60):
            while not check():
                self.swapped.clear()
                await self.swapped.wait()


async def main(tokens: int = 10_000, endpoints: int = 1_000) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        api = stack.enter_context(KubeApi())
        api.apply(
            CRDS, *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"team-{n}"}} for n in range(50))
        )
        config = api.kubeconfig()
        async with Client(from_kubeconfig(str(config))) as client:
            began = time.perf_counter()
            await filled(client, tokens, endpoints)
            print(f"{tokens} tokens, {endpoints} endpoints written in {time.perf_counter() - began:.0f} s")
            address = f"unix:{folder / 'policy.sock'}"
            publisher = Process(config, address, folder / "log")
            print(f"publisher: start to telling the whole policy {await publisher.start():.2f} s")
            await measured(client, publisher, Follower(address, folder), tokens)
            await publisher.kill()


async def measured(client: Client, publisher: Process, follower: Follower, tokens: int) -> None:
    resource = ARKS["ArksToken"]
    async with Pauses().watched() as pauses:
        began = time.perf_counter()
        await follower.source.start()
        started_s = time.perf_counter() - began
        print(f"extproc: connection to whole policy {started_s:.2f} s, worst pause {pauses.taken() * 1000:.1f} ms")
        tasks = [asyncio.create_task(work()) for work in (follower.source.run, follower.run)]
        await follower.until(lambda: follower.rpm(tokens // 2) == 5)
        await asyncio.sleep(3)
        pauses.taken()
        noise = []
        for _ in range(10):
            await asyncio.sleep(0.5)
            noise.append(pauses.taken())
        print(f"pauses without a change              {spread(noise)}")
        took_s, paused = [], []
        for change in range(CHANGES):
            index = change * 97 % tokens
            body = {"spec": token(index, rpm=100 + change)["spec"]}
            began = time.perf_counter()
            asked = asyncio.create_task(client.patch(resource, f"token-{index}", f"team-{index % NAMESPACES}", body))
            await follower.until(lambda i=index, c=change: follower.rpm(i) == 100 + c)
            took_s.append(time.perf_counter() - began)
            await asked
            paused.append(pauses.taken())
            await asyncio.sleep(0.05)
        print(f"one change, API request to decision  {percentiles(took_s)}")
        print(f"          pauses of extproc's loop   {percentiles(paused)}")
        burst = min(500, tokens)
        began = time.perf_counter()
        gate = asyncio.Semaphore(WRITERS)

        async def change(index: int) -> None:
            async with gate:
                body = {"spec": token(index, rpm=7)["spec"]}
                await client.patch(resource, f"token-{index}", f"team-{index % NAMESPACES}", body)

        await asyncio.gather(*(change(index) for index in range(burst)))
        wrote = time.perf_counter()
        await follower.until(lambda: all(follower.rpm(index) == 7 for index in range(burst)))
        behind_ms = (time.perf_counter() - wrote) * 1000
        print(f"{burst} changes at once: written in {wrote - began:.2f} s, in force {behind_ms:.0f} ms after the last")
        print(f"          worst pause of the loop    {pauses.taken() * 1000:.1f} ms")
        await asyncio.sleep(2)
        spent, since = publisher.cpu_s(), time.perf_counter()
        ours = time.process_time()
        await asyncio.sleep(10)
        lasted_s = time.perf_counter() - since
        share = (publisher.cpu_s() - spent) / lasted_s * 100
        print(f"idle: publisher {share:.1f} % of a core, {publisher.rss_mb():.0f} MB")
        print(f"      extproc's end {(time.process_time() - ours) / lasted_s * 100:.1f} % (1 kHz tick included)")
        await publisher.kill()
        pauses.taken()
        again_s = await publisher.start()
        while not follower.source.status.ok:  # noqa: ASYNC110 - a bench may look
            await asyncio.sleep(0.01)
        await asyncio.sleep(3)
        print(f"publisher killed: back and telling after {again_s:.2f} s; resynced, {follower.source.resyncs} gaps")
        print(f"      worst pause while resyncing    {pauses.taken() * 1000:.1f} ms")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
