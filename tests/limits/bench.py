"""Micro-benchmark, run by hand: `python -m tests.limits.bench`."""

import statistics
import sys
import time
import tempfile
from pathlib import Path

from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.model import UsageRecord
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Rule


def rules(token: int) -> tuple[Rule, ...]:
    big = 1 << 50
    return (
        Rule(f"rate/default/token-{token}/qwen/rpm", "rpm", "requests", big, 60),
        Rule(f"rate/default/token-{token}/qwen/rpd", "rpd", "requests", big, 86400),
        Rule(f"rate/default/token-{token}/qwen/tpm", "tpm", "total", big, 60),
        Rule(f"rate/default/token-{token}/qwen/tpd", "tpd", "total", big, 86400),
        Rule(f"quota/default/basic-{token // 100}/prompt", "prompt", "prompt", big, 0),
        Rule(f"quota/default/basic-{token // 100}/response", "response", "response", big, 0),
        Rule(f"quota/default/basic-{token // 100}/total", "total", "total", big, 0),
        Rule(f"concurrency/default/token-{token}", "concurrency", "concurrent", 1 << 30, 0),
    )


def record(n: int) -> UsageRecord:
    return UsageRecord(
        id=f"{n:016x}-abcdef", attempt=1, request_id=f"req-{n}", time_ms=1_700_000_000_000 + n, token="example-token",
        namespace="default", model="qwen-7b", endpoint="qwen-7b", engine="10.0.0.1:8000", status=200, prompt_tokens=123,
        completion_tokens=45, cached_tokens=0, reasoning_tokens=0, accuracy="exact", stream=True, duration_ms=1234,
        ttft_ms=56,
    )


def pairs(store: MemoryStore, tokens: int, n: int = 50_000) -> tuple[float, float]:
    sets = [rules(t) for t in range(tokens)]
    ids = [f"{i:016x}" for i in range(n)]
    asked, actual = Amounts(1, 100, 4096), Amounts(1, 90, 300)
    for r in sets:
        store.reserve("warm", r, asked, ttl_s=600).holds  # noqa
        store.tick
        store.settle(next(iter(store._books[600].values())), actual)
    reserve = settle = 0.0
    for start in range(0, n, 1000):
        t0 = time.perf_counter()
        leases = [store.reserve(i, sets[k % tokens], asked, ttl_s=600) for k, i in enumerate(ids[start : start + 1000])]
        t1 = time.perf_counter()
        for lease in leases:
            store.settle(lease, actual)
        reserve += t1 - t0
        settle += time.perf_counter() - t1
    return reserve / n * 1e6, settle / n * 1e6


if __name__ == "__main__":
    for tokens in (1, 1000):
        best = min(pairs(MemoryStore(), tokens) for _ in range(5))
        print(f"memory, {tokens} tokens: reserve {best[0]:.2f} us, settle {best[1]:.2f} us")
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), JournalSettings(max_queued=10_000_000))
        store = MemoryStore(journal=journal)
        ledger = SqliteLedger(journal)
        # not started: the loop's side alone
        journal.idle = False
        best = min(pairs(store, 1000) for _ in range(3))
        print(f"journaled, 1000 tokens: reserve {best[0]:.2f} us, settle {best[1]:.2f} us")
        rows = [record(i) for i in range(100_000)]
        t0 = time.perf_counter()
        for row in rows:
            ledger.append(row)
        print(f"append {(time.perf_counter() - t0) / len(rows) * 1e6:.3f} us")
        cpu = time.thread_time(); t0 = time.perf_counter()
        journal._flush()
        print(f"write {len(rows)} rows: {(time.thread_time() - cpu) / len(rows) * 1e6:.2f} CPU-us each, wall {time.perf_counter() - t0:.2f} s", journal.status)
        journal.close()
