"""Figures of the policy folder at 10 000 tokens and 1 000 endpoints: `python -m tests.snapshot.bench`.

Pauses are seen by a task that wakes every millisecond; the first line of them is the machine's own noise.
"""

import asyncio
import contextlib
import gc
import resource
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from apis.policy import Policy
from extproc.snapshot.folder import FolderSource
from extproc.snapshot.index import LiveIndex
from tests.snapshot.conftest import endpoint, quota, token

TOKENS, NAMESPACES, MODELS = 10_000, 50, 20
ROUTE = "  routeConfigs:\n    - {group: gateway.envoyproxy.io, kind: Backend, name: be}\n"
BACKEND = """\
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata:
  name: be
spec: {endpoints: [{ip: {address: 10.0.0.1, port: 8080}}]}
"""
RATES = "".join(f"        - type: {kind}\n          value: 100000\n" for kind in ("tpm", "rpd", "tpd"))


def of(namespace: int, document: str) -> str:
    return document.replace("metadata:\n", f"metadata:\n  namespace: team-{namespace}\n", 1)


def numbered(index: int, rpm: int = 5) -> str:
    document = token(f"token-{index}", f"sk-{index}", endpoint=f"model-{index % MODELS}", rpm=rpm, quota="basic")
    return of(index % NAMESPACES, document.replace(f"value: {rpm}\n", f"value: {rpm}\n{RATES}", 1))


def spread(values_s: list[float]) -> str:
    values = sorted(value * 1000 for value in values_s)
    return f"median {values[len(values) // 2]:7.1f} ms   worst {values[-1]:7.1f} ms"


class Pauses:
    def __init__(self) -> None:
        self.worst_s = 0.0

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator["Pauses"]:
        task = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            task.cancel()

    async def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.worst_s = max(self.worst_s, now - last - 0.001)
            last = now

    def taken(self) -> float:
        worst_s, self.worst_s = self.worst_s, 0.0
        return worst_s


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = [numbered(index) for index in range(TOKENS)]
        others = [of(n, endpoint(f"model-{m}", ROUTE)) for n in range(NAMESPACES) for m in range(MODELS)]
        others += [of(n, text) for n in range(NAMESPACES) for text in (quota(), BACKEND)]
        (folder / "tokens.yaml").write_text("---\n".join(documents))
        (folder / "others.yaml").write_text("---\n".join(others))
        policies: asyncio.Queue[Policy] = asyncio.Queue()
        source = FolderSource(folder, lambda policy, _: policies.put_nowait(policy))
        live = LiveIndex()

        began = time.perf_counter()
        await source.start()
        loaded = time.perf_counter()
        live.replace(policies.get_nowait())
        indexed = time.perf_counter()
        gc.collect()
        gc.freeze()
        index_ms = (indexed - loaded) * 1000
        print(f"{source.status.tokens} tokens, {source.status.endpoints} endpoints, {len(source.status.notes)} notes")
        print(f"first load {loaded - began:.2f} s, index {index_ms:.0f} ms, peak RSS {peak_mb():.0f} MB")

        async with Pauses().watched() as pauses:
            noise = []
            for _ in range(10):
                await asyncio.sleep(0.5)
                noise.append(pauses.taken())
            print(f"pauses without a change     {spread(noise)}")
            run = asyncio.create_task(source.run())
            await asyncio.sleep(1)
            reached, indexed_s, paused = [], [], []
            for change in range(10):
                documents[TOKENS // 2] = numbered(TOKENS // 2, rpm=50 + change)
                await replaced(folder, documents)
                pauses.taken()
                began = time.perf_counter()
                policy = await policies.get()
                reached.append(time.perf_counter() - began)
                began = time.perf_counter()
                await live.apply(policy)
                indexed_s.append(time.perf_counter() - began)
                paused.append(pauses.taken())
                await asyncio.sleep(0.2)
            print(f"one token changed: pauses   {spread(paused)}")
            print(f"           file to policy   {spread(reached)}")
            print(f"          policy to index   {spread(indexed_s)}")
            await replaced(folder, [numbered(index, rpm=77) for index in range(TOKENS)])
            pauses.taken()
            began = time.perf_counter()
            await live.apply(await policies.get())
            print(
                f"every token changed: {time.perf_counter() - began:.2f} s, worst pause {pauses.taken() * 1000:.1f} ms"
            )
            spent = time.process_time()
            await asyncio.sleep(5)
            print(f"idle: {(time.process_time() - spent) / 5 * 100:.1f} % of a core (this clock's ticks included)")
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run
        print(f"peak RSS {peak_mb():.0f} MB")


async def replaced(folder: Path, documents: list[str]) -> None:
    """As an editor does it; in a thread, so that writing is no pause."""
    fresh = folder / "tokens.new"
    await asyncio.to_thread(fresh.write_text, "---\n".join(documents))
    fresh.rename(folder / "tokens.yaml")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    uvloop.run(main())
