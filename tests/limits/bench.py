"""What one request pays, run by hand: `python -m tests.limits.bench`."""

import tempfile
import time
from pathlib import Path

from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Lease, Rule
from tests.limits.ground import record

BATCH = 100


def rules(token: int) -> tuple[Rule, ...]:
    """4 rates, 3 quotas, concurrency: the complete path."""
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


def pairs(store: MemoryStore, tokens: int, count: int = 50_000) -> tuple[float, float]:
    """Microseconds for a reserve and for a settle, with up to 100 leases open."""
    sets = [rules(token) for token in range(tokens)]
    ids = [f"{n:016x}" for n in range(count)]
    asked, actual = Amounts(1, 100, 4096), Amounts(1, 90, 300)
    reserve_s = settle_s = 0.0
    for start in range(0, count, BATCH):
        leases: list[Lease] = []
        t0 = time.perf_counter()
        for n in range(start, start + BATCH):
            leases.append(store.reserve(ids[n], sets[n % tokens], asked, ttl_s=600.0))  # type: ignore[arg-type] # noqa: PERF401 - timed
        t1 = time.perf_counter()
        for lease in leases:
            store.settle(lease, actual)
        t2 = time.perf_counter()
        if start >= tokens:
            reserve_s += t1 - t0
            settle_s += t2 - t1
        # The journal's part, which is not measured here.
        store._saved.collect()
        store._saved.wrote()
    measured = count - tokens
    return reserve_s / measured * 1e6, settle_s / measured * 1e6


def main() -> None:
    for tokens in (1, 1000):
        reserve_us, settle_us = min(pairs(MemoryStore(), tokens) for _ in range(5))
        print(f"memory, {tokens} tokens: reserve {reserve_us:.2f} us, settle {settle_us:.2f} us")
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), JournalSettings(max_queued=10_000_000))
        store, ledger = MemoryStore(journal=journal), SqliteLedger(journal)
        journal.idle = False
        reserve_us, settle_us = min(pairs(store, 1000) for _ in range(5))
        print(f"journaled, 1000 tokens: reserve {reserve_us:.2f} us, settle {settle_us:.2f} us")
        rows = [record(f"{n:016x}-abcdef", request_id=f"{n:032x}") for n in range(100_000)]
        t0 = time.perf_counter()
        for row in rows:
            ledger.append(row)
        append_us = (time.perf_counter() - t0) / len(rows) * 1e6
        cpu_s = time.thread_time()
        journal._flush()
        write_us = (time.thread_time() - cpu_s) / len(rows) * 1e6
        print(f"ledger: append {append_us:.3f} us, write {write_us:.2f} CPU-us a row")
        journal.close()


if __name__ == "__main__":
    main()
