"""Load on a busy event loop with the journal beside it, run by hand: `python -m tests.ledger.bench [seconds]`."""

import asyncio
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvloop

from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts
from tests.limits.bench import record, rules

RATE = 20_000
BURST = 20


async def load(journal: Journal | None, store: MemoryStore | None, ledger: SqliteLedger | None, seconds: float, busy: float):
    """RATE records each second in bursts, and Python work for the rest of `busy` of each millisecond."""
    loop = asyncio.get_running_loop()
    rows = [record(i) for i in range(int(RATE * seconds) + BURST)]
    plans = [rules(t) for t in range(1000)]
    asked, actual = Amounts(1, 100, 4096), Amounts(1, 90, 300)
    lags: list[float] = []
    depth = 0
    begin = time.perf_counter()
    sent = 0
    period = BURST / RATE
    open_leases = []

    def lag(due: float) -> None:
        now = loop.time()
        lags.append(now - due)
        loop.call_at(now + 0.005, lag, now + 0.005)

    lag(loop.time())
    while time.perf_counter() - begin < seconds:
        for _ in range(BURST):
            if store is not None:
                open_leases.append(store.reserve(f"{sent:016x}-abcdef", plans[sent % 1000], asked, ttl_s=600, context=b"x" * 200))
                if len(open_leases) > RATE // 4:
                    store.settle(open_leases.pop(0), actual)
            if ledger is not None:
                ledger.append(rows[sent])
            sent += 1
        until = begin + (sent / BURST - 1 + busy) * period
        while time.perf_counter() < until:
            sum(range(50))
        if journal is not None:
            depth = max(depth, journal._queued())
        await asyncio.sleep(max(0, begin + sent / BURST * period - time.perf_counter()))
    lags.sort()
    return sent / (time.perf_counter() - begin), lags[len(lags) // 2] * 1e3, lags[int(len(lags) * 0.99)] * 1e3, lags[-1] * 1e3, depth


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    if len(sys.argv) > 2:
        sys.setswitchinterval(float(sys.argv[2]))
    for busy in (0.5, 0.8, 0.95):
        for kind in ("nothing", "ledger", "ledger and leases of 250 ms"):
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                journal = store = ledger = None
                if kind != "nothing":
                    journal = Journal(Path(folder), JournalSettings(max_queued=1_000_000))
                    store = MemoryStore(journal=journal) if "leases" in kind else None
                    ledger = SqliteLedger(journal)
                    waits: list[float] = []
                    flush = journal._flush

                    def timed(flush=flush, waits=waits):
                        start = time.perf_counter(); cpu = time.thread_time()
                        ok = flush()
                        waits.append((time.perf_counter() - start, time.thread_time() - cpu))
                        return ok

                    journal._flush = timed
                    journal.start()
                rate, p50, p99, worst, depth = uvloop.run(load(journal, store, ledger, seconds, busy))
                text = f"busy {busy:.0%} {kind}: {rate:.0f}/s, loop lag p50 {p50:.2f} p99 {p99:.2f} max {worst:.1f} ms"
                if journal is not None:
                    walls = sorted(w for w, _ in waits)
                    cpu = sum(c for _, c in waits)
                    text += (
                        f"; flush wall p50 {walls[len(walls) // 2] * 1e3:.0f} p99 {walls[int(len(walls) * 0.99)] * 1e3:.0f} ms,"
                        f" {len(walls)} flushes, writer {cpu / rate / seconds * 1e6:.2f} CPU-us/record, queue max {depth}"
                    )
                    journal.close(20)
                print(text, flush=True)


if __name__ == "__main__":
    main()
