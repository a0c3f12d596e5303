"""What a `kill -9` may cost: nothing that was settled before the journal's last transaction began."""

import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from extproc.journal.writer import Journal
from extproc.ledger.model import LEASE_EXPIRED
from extproc.ledger.query import query
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from tests.limits.ground import ONE, admitted, refused
from tests.limits.victim import HELD, RULES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Killed:
    """What a process had said when it died."""

    settled: int
    """requests that it acknowledged"""
    saved: int
    """how many of them at the beginning of its last transaction that was committed"""


def kill_at_random(state_dir: Path) -> Killed:
    command = [sys.executable, "-m", "tests.limits.victim", str(state_dir)]
    after = random.randint(200, 1000)
    said = {"settled": 0, "saved": 0}
    alive = True
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        for line in victim.stdout:
            if line.endswith("\n"):
                what, number = line.split()
                said[what] = int(number)
            # The requests that it holds from its beginning on are saved with its first transaction.
            if alive and said["saved"] and said["settled"] >= after:
                alive = False
                victim.kill()
    assert not alive, "it ended by itself"
    return Killed(**said)


def test_kill_loses_nothing_settled_before_the_last_transaction_and_a_restart_continues_everything(tmp_path: Path):
    """That a transaction begins within 40 ms of what it saves is `test_row_is_durable_within_100_ms_without_asking`'s
    promise: together they are what a kill may cost.
    """
    for round_ in range(5):
        state_dir = tmp_path / str(round_)
        killed = kill_at_random(state_dir)
        rows = {row.id for row in query(state_dir) if row.id.startswith("r")}
        journal = Journal(state_dir)
        store = MemoryStore(journal=journal)
        settled, tokens = store.used(RULES[0].key), store.used(RULES[1].key)
        journal.close()

        assert 0 < killed.saved <= min(len(rows), settled)
        assert rows == {f"r{n}" for n in range(len(rows))}, "a row is lost only with all that came after it"
        # One that was settled may not have been acknowledged yet.
        assert max(len(rows), settled) <= killed.settled + 1
        assert tokens == store.used(RULES[2].key) == 15 * settled
        # The held leases are reserved still; besides them at most the one that was open at the last flush.
        assert HELD <= store.open_leases <= HELD + 1
        assert store.reserved(RULES[2].key) == 100 * store.open_leases


def test_slots_of_requests_that_ended_with_the_process_are_free_at_once(tmp_path: Path):
    kill_at_random(tmp_path)
    journal = Journal(tmp_path)
    store = MemoryStore(journal=journal)
    assert store.open_leases >= HELD
    for n in range(100):
        admitted(store.reserve(f"new-{n}", RULES, ONE, ttl_s=86_400))
    assert refused(store.reserve("one too many", RULES, ONE, ttl_s=60)).rule == RULES[3]
    journal.close()


def test_lease_left_open_by_a_crash_expires_as_an_estimate(tmp_path: Path):
    kill_at_random(tmp_path)
    journal = Journal(tmp_path)
    ledger = SqliteLedger(journal)
    now_s = time.time()
    store = MemoryStore(clock=lambda: now_s, journal=journal, ledger=ledger)
    used, open_leases = store.used(RULES[2].key), store.open_leases
    now_s += 3700
    store.tick()
    assert store.open_leases == 0
    assert store.used(RULES[2].key) == used + 100 * open_leases
    assert journal._flush()
    journal.close()
    expired = [row for row in query(tmp_path) if row.error == LEASE_EXPIRED]
    assert {row.id for row in expired} >= {f"held-{n}" for n in range(HELD)}
    assert {(row.accuracy, row.status, row.prompt_tokens, row.completion_tokens) for row in expired} == {
        ("estimated", 0, 10, 90)
    }
