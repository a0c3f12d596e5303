"""20 000 rows a second on a busy uvloop with the journal beside it: `python -m tests.ledger.bench [SECONDS]`."""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts, Lease
from tests.limits.bench import rules
from tests.limits.ground import record

RATE = 20_000
BURST = 20
OPEN = RATE // 4


class Load:
    """Bursts of rows each millisecond, Python work for the share `busy` of it, and a timer that sees how late it is."""

    def __init__(self, kind: str, seconds: float, busy: float, folder: Path) -> None:
        self.seconds, self.busy = seconds, busy
        self.lags_s: list[float] = []
        self.flushes: list[tuple[float, float]] = []
        self.rows = [record(f"{n:016x}-abcdef", request_id=f"{n:032x}") for n in range(int(RATE * seconds) + BURST)]
        self.rules = [rules(token) for token in range(1000)]
        self.journal = Journal(folder, JournalSettings(max_queued=1_000_000)) if kind != "nothing" else None
        self.store = MemoryStore(journal=self.journal) if "leases" in kind else None
        self.ledger = SqliteLedger(self.journal) if self.journal else None
        self.leases: list[Lease] = []
        if self.journal is not None:
            self.flush, self.journal._flush = self.journal._flush, self.timed_flush  # type: ignore[method-assign]
            self.journal.start()

    def timed_flush(self) -> bool:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        ok = self.flush()
        self.flushes.append((time.perf_counter() - wall_s, time.thread_time() - cpu_s))
        return ok

    def one(self, n: int) -> None:
        if self.store is not None:
            lease = self.store.reserve(
                f"{n:016x}-abcdef", self.rules[n % 1000], Amounts(1, 100, 4096), ttl_s=600, context=lambda: b"x" * 200
            )
            assert isinstance(lease, Lease)
            self.leases.append(lease)
            if len(self.leases) > OPEN:
                self.store.settle(self.leases.pop(0), Amounts(1, 90, 300))
        if self.ledger is not None:
            self.ledger.append(self.rows[n])

    async def lag(self) -> None:
        while True:
            due = time.perf_counter() + 0.005
            await asyncio.sleep(0.005)
            self.lags_s.append(time.perf_counter() - due)

    async def run(self) -> str:
        lag = asyncio.create_task(self.lag())
        begin = time.perf_counter()
        sent = 0
        while time.perf_counter() - begin < self.seconds:
            for n in range(sent, sent + BURST):
                self.one(n)
            until = begin + (sent / BURST + self.busy) * BURST / RATE
            sent += BURST
            while time.perf_counter() < until:
                sum(range(50))
            await asyncio.sleep(max(0.0, begin + sent / RATE - time.perf_counter()))
        rate = sent / (time.perf_counter() - begin)
        lag.cancel()
        self.lags_s.sort()
        p50, p99 = (self.lags_s[int(len(self.lags_s) * q)] * 1e3 for q in (0.5, 0.99))
        text = f"{rate:.0f}/s, loop lag p50 {p50:.1f} p99 {p99:.1f} max {self.lags_s[-1] * 1e3:.0f} ms"
        if self.journal is not None:
            walls = sorted(wall_s for wall_s, _ in self.flushes)
            cpu_us = sum(cpu_s for _, cpu_s in self.flushes) / sent * 1e6
            p50, p99 = (walls[int(len(walls) * q)] * 1e3 for q in (0.5, 0.99))
            text += f"; {len(walls)} flushes, p50 {p50:.0f} p99 {p99:.0f} ms, writer {cpu_us:.1f} CPU-us a row"
            self.journal.close(20)
        return text


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    for busy in (0.5, 0.8, 0.95):
        for kind in ("nothing", "ledger", "ledger and leases of 250 ms"):
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                load = Load(kind, seconds, busy, Path(folder))
                print(f"busy {busy:.0%}, {kind}: {uvloop.run(load.run())}", flush=True)


if __name__ == "__main__":
    main()
