"""A process that works until it is killed: `python -m tests.limits.victim STATE`. Prints what it acknowledged."""

import asyncio
import sys
import time
from pathlib import Path

import uvloop

from extproc.journal.writer import Journal
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.context import encode_context
from extproc.limits.memory import MemoryStore
from extproc.limits.model import Amounts
from tests.limits.ground import ONE, admitted, concurrency, quota, record, rpd, tpd

RULES = (rpd(10**9), tpd(10**9), quota(10**9), concurrency(100))
HELD = 7


async def work(state_dir: Path) -> None:
    journal = Journal(state_dir)
    ledger = SqliteLedger(journal)
    store = MemoryStore(journal=journal, ledger=ledger)
    journal.start()
    for n in range(HELD):
        context = encode_context(record(f"held-{n}"))
        admitted(store.reserve(f"held-{n}", RULES, ONE, ttl_s=3600, context=lambda context=context: context))
    n = 0
    while True:
        lease = admitted(store.reserve(f"r{n}", RULES, ONE, ttl_s=60))
        if n % 10 == 0:
            await asyncio.sleep(0.001)
        store.settle(lease, Amounts(1, 10, 5))
        ledger.append(record(f"r{n}"))
        n += 1
        # Unix time, and how many requests were settled before it
        sys.stdout.write(f"{time.time()} {n}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(work(Path(sys.argv[1])))
