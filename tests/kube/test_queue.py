"""The work queue, in virtual time: nothing is lost, nothing runs twice at once, failures wait longer and longer."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.kube.errors import InvalidError, NotLeaderError, TooManyRequestsError
from controller.kube.queue import WorkQueue
from tests.harness.virtual_time import run_virtual

RESOLUTION_S = 1e-6  # a loop rings a timer that much early
Handle = Callable[[str], Awaitable[float | None]]


async def worked(queue: WorkQueue[str], for_s: float) -> None:
    """Let the queue run for so long, virtually."""
    task = asyncio.create_task(queue.run())
    await asyncio.sleep(for_s)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


actions = st.lists(
    st.tuples(
        st.floats(0, 20),  # when
        st.sampled_from("abc"),
        st.sampled_from(["add", "after"]),
        st.floats(0, 5),  # delay
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(1, 3), st.dictionaries(st.sampled_from("abc"), st.integers(0, 4)), st.floats(0, 3))
def test_every_add_is_handled_afterwards_by_one_worker_at_a_time(
    plan: list[tuple[float, str, str, float]], workers: int, failing: dict[str, int], takes_s: float
) -> None:
    started: dict[str, list[float]] = {key: [] for key in "abc"}
    running: Counter[str] = Counter()
    left = Counter(failing)

    async def handle(key: str) -> None:
        running[key] += 1
        assert running[key] == 1
        assert running.total() <= workers
        started[key].append(asyncio.get_running_loop().time())
        await asyncio.sleep(takes_s)
        running[key] -= 1
        if left[key] > 0:
            left[key] -= 1
            raise ValueError(key)

    async def main() -> WorkQueue[str]:
        queue: WorkQueue[str] = WorkQueue(handle, workers=workers)
        loop = asyncio.get_running_loop()
        for at, key, how, delay_s in plan:
            loop.call_at(at, *((queue.add, key) if how == "add" else (queue.add_after, key, delay_s)))
        await worked(queue, 2000)
        return queue

    queue = run_virtual(main())
    for at, key, how, _ in plan:
        if how == "add":
            assert any(begin >= at - RESOLUTION_S for begin in started[key])
        else:  # at its time, or earlier through another add that came after the request
            assert any(begin >= at - RESOLUTION_S for begin in started[key])
    touched = {key for _, key, _, _ in plan}
    assert all(not started[key] for key in set("abc") - touched)
    assert all(left[key] == 0 or key not in touched for key in "abc")
    assert queue.depth == queue.in_flight == queue.delayed == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40))
def test_a_burst_of_the_same_key_is_one_handling_and_at_most_one_more(adds: int) -> None:
    handled = 0

    async def main() -> None:
        async def handle(key: str) -> None:
            nonlocal handled
            handled += 1
            await asyncio.sleep(1)

        queue: WorkQueue[str] = WorkQueue(handle)
        for _ in range(adds):
            queue.add("a")
        loop = asyncio.get_running_loop()
        for n in range(adds):
            loop.call_at(0.01 * n + 0.01, queue.add, "a")
        await worked(queue, 100)

    run_virtual(main())
    assert handled == 2


def test_failures_of_a_key_wait_longer_and_longer_and_hold_up_no_other() -> None:
    starts: list[float] = []
    others = 0

    async def main() -> WorkQueue[str]:
        async def handle(key: str) -> None:
            nonlocal others
            if key == "other":
                others += 1
                return
            starts.append(asyncio.get_running_loop().time())
            raise OSError("down")

        queue: WorkQueue[str] = WorkQueue(handle, workers=1, backoff_first_s=0.2, backoff_max_s=10)
        queue.add("bad")
        for n in range(100):
            asyncio.get_running_loop().call_at(float(n), queue.add, "other")
        await worked(queue, 100)
        return queue

    queue = run_virtual(main())
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    for n, pause in enumerate(pauses):
        longest = min(10.0, 0.2 * 2**n)
        assert longest * 0.49 <= pause <= longest * 1.01
    assert others == 100
    assert queue.stats.failed == len(starts) == queue.failures("bad")


def test_an_edit_ends_the_back_off() -> None:
    starts: list[float] = []

    async def main() -> None:
        async def handle(key: str) -> None:
            starts.append(asyncio.get_running_loop().time())
            if len(starts) == 1:
                raise OSError("down")

        queue: WorkQueue[str] = WorkQueue(handle, backoff_first_s=60)
        queue.add("a")
        asyncio.get_running_loop().call_at(5.0, queue.add, "a")
        await worked(queue, 500)

    run_virtual(main())
    assert starts == [0.0, 5.0]


@pytest.mark.parametrize(
    ("error", "handled", "again_s"),
    [
        (InvalidError(422, "no"), 1, 0.0),
        (NotLeaderError("no"), 2, 0.05),
        (TooManyRequestsError(429, "no", retry_after_s=20), 2, 20.0),
        (asyncio.CancelledError(), 2, 0.05),
        (TimeoutError(), 2, 0.05),
    ],
)
def test_each_kind_of_failure_is_tried_again_as_it_deserves(error: BaseException, handled: int, again_s: float) -> None:
    starts: list[float] = []

    async def main() -> None:
        async def handle(key: str) -> None:
            starts.append(asyncio.get_running_loop().time())
            if len(starts) == 1:
                raise error

        queue: WorkQueue[str] = WorkQueue(handle, workers=1)
        queue.add("a")
        await worked(queue, 500)

    run_virtual(main())
    assert len(starts) == handled
    assert starts[-1] >= again_s


def test_a_handler_that_hangs_is_cut_off_and_tried_again() -> None:
    async def main() -> WorkQueue[str]:
        async def handle(key: str) -> None:
            await asyncio.Event().wait()

        queue: WorkQueue[str] = WorkQueue(handle, workers=1, timeout_s=10)
        queue.add("a")
        task = asyncio.create_task(queue.run())
        await asyncio.sleep(5)
        assert queue.longest_running_s() == 5.0
        await asyncio.sleep(20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return queue

    assert run_virtual(main()).stats.timed_out >= 1


def test_the_handler_says_when_it_wants_to_look_again() -> None:
    starts: list[float] = []

    async def main() -> None:
        async def handle(key: str) -> float:
            starts.append(asyncio.get_running_loop().time())
            return 10.0

        queue: WorkQueue[str] = WorkQueue(handle)
        queue.add("a")
        queue.add_after("a", 3.0)  # superseded: it is handled at once
        await worked(queue, 35)

    run_virtual(main())
    assert starts == [0.0, 10.0, 20.0, 30.0]


def test_stop_lets_what_is_in_flight_end_and_starts_nothing_new() -> None:
    done: list[str] = []

    async def main() -> None:
        async def handle(key: str) -> None:
            await asyncio.sleep(1)
            done.append(key)

        queue: WorkQueue[str] = WorkQueue(handle, workers=2)
        task = asyncio.create_task(queue.run())
        for key in "abcd":
            queue.add(key)
        await asyncio.sleep(0.5)
        assert await queue.stop(timeout_s=5)
        queue.add("e")
        await asyncio.wait_for(task, 1)

    run_virtual(main())
    assert sorted(done) == ["a", "b"]


def test_stop_says_when_something_would_not_end() -> None:
    async def main() -> bool:
        queue: WorkQueue[str] = WorkQueue(lambda key: asyncio.sleep(50))
        task = asyncio.create_task(queue.run())
        queue.add("a")
        await asyncio.sleep(0.1)
        ended = await queue.stop(timeout_s=5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return ended

    assert run_virtual(main()) is False


def test_ten_thousand_delayed_keys_leave_no_garbage() -> None:
    handled: Counter[str] = Counter()

    async def main() -> WorkQueue[str]:
        async def handle(key: str) -> None:
            handled[key] += 1

        queue: WorkQueue[str] = WorkQueue(handle)
        for n in range(10_000):
            queue.add_after(f"k{n}", 10 + n % 7)
            queue.add_after(f"k{n}", 5 + n % 7)
        await worked(queue, 30)
        return queue

    queue = run_virtual(main())
    assert set(handled.values()) == {1}
    assert len(handled) == 10_000
    assert queue.delayed == 0
