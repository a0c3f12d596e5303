"""Leaders that die and sleep, as `arks controller` with its Lease of 15 s. `make test-faults`."""

from __future__ import annotations

import os

import pytest

from tests.reconcile.conftest import Room
from tests.reconcile.faults import test_leaders
from tests.reconcile.faults.world import Start

REAL = True
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.environ.get("ARKS_FAULTS") != "1", reason="takes minutes; make test-faults"),
]


async def test_a_leader_killed_in_the_midst_of_hundreds_of_writes(hall: Room, start: Start):
    await test_leaders.test_a_leader_killed_in_the_midst_of_hundreds_of_writes(hall, start)


async def test_a_leader_that_slept_through_its_succession_writes_nothing_when_it_wakes(hall: Room, start: Start):
    await test_leaders.test_a_leader_that_slept_through_its_succession_writes_nothing_when_it_wakes(hall, start)
