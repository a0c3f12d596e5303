"""What a first sync costs, as a process of its own: prints one line of JSON.

usage: sync_cost.py HOST PORT FOLDER NAMESPACE stream|pages     (FOLDER holds token and ca.crt, as in a pod)
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import msgspec

from controller.kube.client import Client, decoder
from controller.kube.credentials import in_cluster
from controller.kube.reflector import Reflector
from controller.kube.resource import Resource

PEARS = Resource("kube.test", "v1", "pears", "Pear")


class Meta(msgspec.Struct):
    name: str
    namespace: str
    labels: dict[str, str] = {}
    generation: int = 0


class Spec(msgspec.Struct):
    size: int
    color: str = ""
    text: str = ""


class Typed(msgspec.Struct):
    metadata: Meta
    spec: Spec


def rss_mb() -> float:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


async def main(host: str, port: str, folder: Path, namespace: str, how: str) -> None:
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    async with Client(in_cluster(folder, environ)) as client:
        await client.raw("/version")
        before_mb, began, cpu = rss_mb(), time.perf_counter(), time.process_time()
        reflector = Reflector(client, PEARS, decoder(Typed), namespace=namespace, streaming=how == "stream")
        task = asyncio.create_task(reflector.run())
        slowest_s = 0.0
        while not reflector.synced.is_set():
            tick = time.thread_time()  # of ours: others may have the processor in between
            await asyncio.sleep(0)
            slowest_s = max(slowest_s, time.thread_time() - tick)
        cost = {
            "objects": len(reflector.store),
            "wall_s": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu,
            "rss_before_mb": before_mb,
            "rss_mb": rss_mb(),
            "loop_blocked_ms": slowest_s * 1000,
        }
        print(json.dumps({name: round(value, 3) for name, value in cost.items()}))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5]))
