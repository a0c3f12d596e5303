"""A process that works until it is killed: `python -m tests.limits.victim STATE`.

Prints what it acknowledged, and what its journal made durable:
    settled N   N requests are settled and booked
    saved N     a transaction is committed that began when N were
"""

import asyncio
import os
import sys
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


def say(what: str, number: int) -> None:
    """Both threads speak: one write for each line."""
    os.write(1, f"{what} {number}\n".encode())


class Telling(Journal):
    settled = 0

    def _flush(self) -> bool:
        begun = self.settled
        flushed = super()._flush()
        if flushed:
            say("saved", begun)
        return flushed


async def work(state_dir: Path) -> None:
    journal = Telling(state_dir)
    ledger = SqliteLedger(journal)
    store = MemoryStore(journal=journal, ledger=ledger)
    journal.start()
    for n in range(HELD):
        context = encode_context(record(f"held-{n}"))
        admitted(store.reserve(f"held-{n}", RULES, ONE, ttl_s=3600, context=lambda context=context: context))
    while True:
        n = journal.settled
        lease = admitted(store.reserve(f"r{n}", RULES, ONE, ttl_s=60))
        if n % 10 == 0:
            await asyncio.sleep(0.001)
        store.settle(lease, Amounts(1, 10, 5))
        ledger.append(record(f"r{n}"))
        journal.settled = n + 1
        say("settled", n + 1)


if __name__ == "__main__":
    uvloop.run(work(Path(sys.argv[1])))
