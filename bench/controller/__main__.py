"""`make bench-controller`: a real API server with ten thousand tokens, and the two commands of the pod beside it.

Everything is real but the nodes: the benchmark writes what kubelets and other projects' controllers would, and one
process answers for the metrics of all engines. See docs/performance.md.
"""

import argparse
import asyncio
import platform
import signal
import tempfile
import time
from pathlib import Path

import uvloop

from bench.controller import cluster, engines, measures, report
from bench.controller.cluster import Api, Cluster
from bench.controller.decisions import asking
from bench.controller.product import Pod, Process
from bench.controller.world import Nodes, Size, followed, resources, tenants

REST_S = 10.0
"""before a stretch that shall be steady: journals, kept policies and events are done with by then"""

_BEGAN_S = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN_S:4.0f} s] {text}", flush=True)


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, where: Cluster, api: Api, addresses: list[str]) -> None:
        self._options, self._where, self._api, self._addresses = options, where, api, addresses
        self._size = Size(options.tokens, options.endpoints, options.pods, options.tenants)

    async def run(self, folder: Path) -> report.Run:
        say(f"the API server is up; writing {self._size}")
        await self._api.write(tenants(self._size))
        await self._api.write(resources(self._size))
        say("written; the controller's first start")
        pod = Pod(self._where.controller, folder / "pod")
        with pod.extproc() as extproc, pod.controller() as controller:
            run = await self._life(pod, controller, extproc)
        for number in range(self._options.rounds):
            run.alone.append(await measures.start(self._where, self._size, together=False))
            run.together.append(await measures.start(self._where, self._size, together=True))
            say(f"start {number + 1}/{self._options.rounds}: {run.alone[-1]}, together {run.together[-1]}")
        return run

    async def _life(self, pod: Pod, controller: Process, extproc: Process) -> report.Run:
        """All that is measured on one life of the two processes."""
        api, size, where, options = self._api, self._size, self._where, self._options
        first = await measures.settled(controller, where, time.time() - controller.age_s)
        await measures.check(api, size, up=False)
        say(f"settled: {first}")
        began_s = time.time()
        await Nodes(api, self._addresses).act()
        second = await measures.settled(controller, where, began_s)
        await measures.check(api, size, up=True)
        say(f"the pods are up and settled: {second}")
        steady = await self._steady(controller, extproc)
        say(f"steady: {steady}")
        async with asking(pod.listen) as decide:
            changes = await measures.changes(api, decide, extproc, size, options.changes, options.burst)
        say(f"tokens came and went: {changes}")
        await api.write(followed(size, "load"))
        await measures.settled(controller, where, time.time())
        looks, began_s = await engines.looks(self._addresses[0]), time.time()
        following = await self._steady(controller, extproc)
        looks_per_s = (await engines.looks(self._addresses[0]) - looks) / (time.time() - began_s)
        say(f"steady, {looks_per_s:.0f} looks a second: {following}")
        return report.Run(size, first, second, steady, following, looks_per_s, changes)

    async def _steady(self, controller: Process, extproc: Process) -> measures.Steady:
        seconds = self._options.seconds
        await asyncio.sleep(min(REST_S, seconds))
        return await measures.steady(controller, extproc, self._where, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.controller", description=__doc__)
    for name, value, text in (
        ("tokens", 10_000, "ArksTokens"),
        ("endpoints", 1_000, "ArksEndpoints, each with an application"),
        ("pods", 2_000, "pods, shared out among the applications"),
        ("tenants", 50, "namespaces"),
        ("changes", 200, "tokens that are created and deleted one by one"),
        ("burst", 500, "tokens that are created at once"),
        ("rounds", 3, "starts of either kind"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a steady stretch (default 60)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where performance.md is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arks-bench-") as name:
        run = uvloop.run(_until_told(options, Path(name)))
    report.write(options.out, run, machine=f"{platform.machine()}, Python {platform.python_version()}")


async def _until_told(options: argparse.Namespace, folder: Path) -> report.Run:
    """SIGTERM ends it as Ctrl-C does: everything that was started is ended, too."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with cluster.running() as where, engines.running(options.pods) as addresses:
        async with cluster.api(where.admin) as api:
            return await Bench(options, where, api, addresses).run(folder)


if __name__ == "__main__":
    main()
