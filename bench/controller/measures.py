"""The measurements, one function each, on a world that stands."""

import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.controller.cluster import Api, Call, Cluster, path
from bench.controller.decisions import ADMITTED, UNKNOWN, Decisions, asking
from bench.controller.product import Pod, Process, policy_of
from bench.controller.world import ARKS, GATEWAY_API, LWS, Size, endpoint_name, secret, tenant, token, token_path
from bench.process import busy_s, family_cpu_s

SETTLE_TIMEOUT_S = 300.0
QUIET_S = 3.0
"""without a write and with an empty queue for so long, it has settled"""
LAG = "arks_event_loop_lag_max_seconds"


@dataclass(slots=True)
class Settling:
    """How the controller brought the world to rest."""

    seconds: float
    """from `began` to the last write"""
    writes: Counter[str]
    cpu_s: float
    peak_mb: float


@dataclass(slots=True)
class Steady:
    """A stretch in which nothing changes."""

    seconds: float
    controller_cpu: float
    """of one core"""
    extproc_cpu: float
    controller_mb: float
    extproc_mb: float
    writes: Counter[str]
    renewals: int
    """of the Lease"""
    others_cpu: float
    """how much of the machine was taken by what is none of the benchmark's"""


@dataclass(slots=True)
class Changes:
    """Seconds from the API server's reply to the first decision that shows it."""

    created: list[float] = field(default_factory=list)
    revoked: list[float] = field(default_factory=list)
    burst: int = 0
    burst_s: float = 0.0
    """from the last reply until all of them decide"""
    pause_s: float = 0.0
    """the longest of extproc's event loop meanwhile"""

    def __str__(self) -> str:
        slowest = [f"{1000 * percentile(each, 0.99):.0f} ms" for each in (self.created, self.revoked)]
        return f"p99 {' and '.join(slowest)}, {self.burst} at once {1000 * self.burst_s:.0f} ms"


@dataclass(slots=True)
class Start:
    """Seconds from the processes' start."""

    told: float
    """the controller is ready to tell the whole policy"""
    serving: float
    """the first decision by it"""
    cpu_s: float
    """of the controller, until then"""


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


async def settled(controller: Process, cluster: Cluster, began_s: float) -> Settling:
    """Wait until nothing is written any more. `began_s`: Unix time from which to count."""
    writes: Counter[str] = Counter()
    last_s, until = began_s, time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        fresh = cluster.new_writes()
        writes += fresh.counts
        last_s = max(last_s, fresh.last_s)
        leads = await controller.metric("arks_controller_leader") == 1
        if leads and time.time() - last_s > QUIET_S and not await controller.metric("arks_controller_queue_depth"):
            return Settling(last_s - began_s, writes, controller.cpu_s, controller.peak_mb)
        if time.monotonic() > until:
            raise SystemExit(f"not settled after {SETTLE_TIMEOUT_S:.0f} s; written so far: {dict(writes)}")
        await asyncio.sleep(0.2)


async def check(api: Api, size: Size, *, up: bool) -> None:
    """The world is as its figures pretend: whatever is not has no benchmark. `up`: its pods are ready."""
    wrong: list[str] = []
    for plural, condition, count in (
        ("arkstokens", "Accepted", size.tokens),
        ("arksendpoints", "Programmed" if up else "Accepted", size.endpoints),
        ("arksapplications", "Ready" if up else "Precheck", size.endpoints),
        ("arksmodels", "Ready", size.tenants),
    ):
        items = await api.items(path(ARKS, plural))
        true = sum(
            any(each["type"] == condition and each["status"] == "True" for each in item["status"]["conditions"])
            for item in items
        )
        if true != count:
            wrong.append(f"{true} of {len(items)} {plural} are {condition}, {count} should be")
    routes = len(await api.items(path(GATEWAY_API, "httproutes")))
    sets = len(await api.items(path(LWS, "leaderworkersets")))
    if (routes, sets) != (size.endpoints, size.endpoints):
        wrong.append(f"{routes} HTTPRoutes and {sets} LeaderWorkerSets, not {size.endpoints} of each")
    if wrong:
        raise SystemExit("the world did not settle as it should:\n" + "\n".join(wrong))


async def steady(controller: Process, extproc: Process, cluster: Cluster, seconds: float) -> Steady:
    cluster.new_writes()
    before, others_s, began = (controller.cpu_s, extproc.cpu_s), _others_s(), time.monotonic()
    await asyncio.sleep(seconds)
    passed = time.monotonic() - began
    spent = controller.cpu_s - before[0], extproc.cpu_s - before[1]
    others_cpu = max(0.0, _others_s() - others_s) / passed / (os.cpu_count() or 1)
    memory = controller.resident_mb, extproc.resident_mb
    writes = cluster.new_writes()
    return Steady(passed, spent[0] / passed, spent[1] / passed, *memory, writes.counts, writes.renewals, others_cpu)


def _others_s() -> float:
    return busy_s() - family_cpu_s(os.getpid())


async def changes(api: Api, decide: Decisions, extproc: Process, size: Size, count: int, burst: int) -> Changes:
    """Tokens come and go one by one, at no beat that anything of the product could share; then many at once."""
    found = Changes(burst=burst)
    await extproc.metric(LAG)  # each reading begins a new maximum
    for number in range(count):
        name, namespace, endpoint = f"new-{number}", tenant(number, size), endpoint_name(number, size)
        call = token(name, namespace, endpoint)
        await api.request(call.method, call.path, call.body)
        found.created.append(await decide.until(secret(name), ADMITTED))
        await asyncio.sleep(random.uniform(0.02, 0.12))
        await api.request("DELETE", token_path(name, namespace))
        found.revoked.append(await decide.until(secret(name), UNKNOWN))
        await asyncio.sleep(random.uniform(0.02, 0.12))
    found.pause_s = await extproc.metric(LAG)
    names = [f"burst-{number}" for number in range(burst)]
    await api.write(token(name, tenant(n, size), endpoint_name(n, size)) for n, name in enumerate(names))
    began = time.monotonic()
    for name in names:
        await decide.until(secret(name), ADMITTED)
    found.burst_s = time.monotonic() - began
    await api.write(Call("DELETE", token_path(name, tenant(n, size))) for n, name in enumerate(names))
    return found


async def start(cluster: Cluster, size: Size, *, together: bool) -> Start:
    """From nothing to the first decision: the controller while an extproc waits for it, or both at once.

    The folder is new, so extproc has no kept policy to serve on meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="arks-bench-") as name:
        pod = Pod(cluster.controller, Path(name) / "pod")
        if together:
            with pod.controller() as controller, pod.extproc() as extproc:
                return await _started(pod, controller, extproc, size)
        with pod.extproc() as extproc:
            await asyncio.sleep(4)  # it asks again and again by now, at its longest pauses
            with pod.controller() as controller:
                return await _started(pod, controller, extproc, size)


async def _started(pod: Pod, controller: Process, extproc: Process, size: Size) -> Start:
    told = asyncio.create_task(controller.ready())
    async with asking(pod.listen) as decide:
        await decide.until(secret(f"token-{size.tokens - 1}"), ADMITTED)
        serving_s, spent_s = controller.age_s, controller.cpu_s
    policy = await policy_of(extproc)
    if (policy["tokens"], policy["endpoints"]) != (size.tokens, size.endpoints):
        raise SystemExit(f"extproc decides by a part of the policy: {policy}")
    return Start(await told, serving_s, spent_s)
