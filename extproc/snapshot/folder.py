"""A folder of YAML, followed: what is in force is always a whole, valid state of it.

Life: `start` reads once and raises what is wrong; `run` follows until it is cancelled. A change is seen through the
kernel's file events, and by looking every half second where events do not come (network file systems, folders that
went and came back, exhausted watches); it is read when the folder has stood still for a moment, since a file half
written can be valid YAML. A state with a fault is reported and changes nothing. All reading happens in one thread of
its own.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from watchfiles import awatch

from apis.policy import EMPTY, Policy
from extproc.snapshot.errors import Note, PolicyError, PolicyErrors
from extproc.snapshot.files import Folder, Loaded, Signature, load_folder
from extproc.snapshot.hosts import REFRESH_S, Hosts, wanted_hosts

__all__ = ["FolderSource", "Loaded", "Notes", "SourceStatus", "load_folder"]

Notes: TypeAlias = tuple[Note, ...]
T = TypeVar("T")

_STILL_S: Final = 0.05
_STILL_LIMIT_S: Final = 0.4
"""a folder that never stands still is read all the same, within the promised second"""
_RETRY_S: Final = 5.0
"""a folder with a fault is read again even if it did not change: the fault may have been the disk's"""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """For /readyz and metrics. `ok` is about the folder's present state; the policy in force is the last good one."""

    ok: bool = False
    errors: tuple[PolicyError, ...] = ()
    notes: Notes = ()
    generation: int = 0
    """policies published so far; 0: none yet"""
    loaded_at_s: float = 0.0
    """Unix time of the last good load"""
    failed_loads: int = 0
    tokens: int = 0
    quotas: int = 0
    endpoints: int = 0


class FolderSource:
    """Callbacks run on the event loop, one at a time."""

    def __init__(
        self,
        path: Path | str,
        on_policy: Callable[[Policy, Notes], None],
        on_error: Callable[[PolicyErrors], None] | None = None,
        *,
        poll_s: float = 0.5,
        hosts: Hosts | None = None,
    ) -> None:
        self.status = SourceStatus()
        self._path = Path(path)
        self._folder = Folder(self._path)
        self._on_policy = on_policy
        self._on_error = on_error
        self._poll_s = poll_s
        self._hosts = hosts or Hosts()
        self._linked = Loaded(EMPTY, ())
        self._published = EMPTY
        self._signature: Signature | None = None
        self._tried_at = 0.0
        self._stirred = asyncio.Event()
        self._new_hosts = asyncio.Event()

    async def start(self) -> Loaded:
        """Read and publish once.

        Raises:
            PolicyErrors: the folder has no valid policy; nothing was published.
        """
        async with self._thread() as thread:
            return await self._start(thread)

    async def run(self) -> None:
        """Follow the folder until cancelled. Reads it first where `start` did not.

        Raises:
            PolicyErrors: only where `start` was not called before.
        """
        async with self._thread() as thread:
            if not self.status.generation:
                await self._start(thread)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(), name="policy folder: file events")
                tasks.create_task(self._resolve(), name="policy folder: host names")
                await self._follow(thread)

    @contextlib.asynccontextmanager
    async def _thread(self) -> AsyncIterator[ThreadPoolExecutor]:
        # Not the loop's own pool: name look-ups that hang there must not keep policy from being read.
        thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        try:
            yield thread
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    async def _start(self, thread: ThreadPoolExecutor) -> Loaded:
        self._signature = await _in(thread, self._folder.signature)
        self._tried_at = time.monotonic()
        try:
            self._linked = await _in(thread, self._folder.load)
        except PolicyErrors as errors:
            self._failed(errors)
            raise
        await self._hosts.refresh(wanted_hosts(self._linked.policy))
        self._publish()
        return Loaded(self._published, self.status.notes)

    async def _follow(self, thread: ThreadPoolExecutor) -> None:
        pause_s = self._poll_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stirred.wait()
            self._stirred.clear()
            seen, cost_s = await _in(thread, self._look)
            # A folder of very many files is looked at less often; its changes come through events. By what a look
            # costs, not by how long it takes: a stall of two seconds would put the next look off by minutes.
            pause_s = max(self._poll_s, 50 * cost_s)
            retry = not self.status.ok and time.monotonic() - self._tried_at > _RETRY_S
            if seen != self._signature or retry:
                self._signature = await self._still(thread, seen)
                await self._reload(thread)

    def _look(self) -> tuple[Signature | None, float]:
        """With its processor time in seconds."""
        began_s = time.thread_time()
        return self._folder.signature(), time.thread_time() - began_s

    async def _still(self, thread: ThreadPoolExecutor, seen: Signature | None) -> Signature | None:
        """Wait until two looks agree."""
        deadline = time.monotonic() + _STILL_LIMIT_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_STILL_S)
            again = await _in(thread, self._folder.signature)
            if again == seen:
                break
            seen = again
        return seen

    async def _reload(self, thread: ThreadPoolExecutor) -> None:
        self._tried_at = time.monotonic()
        try:
            self._linked = await _in(thread, self._folder.load)
        except PolicyErrors as errors:
            self._failed(errors)
            return
        if wanted_hosts(self._linked.policy) - self._hosts.known.keys():
            self._new_hosts.set()
        self._publish()

    async def _resolve(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._new_hosts.wait()
            self._new_hosts.clear()
            if await self._hosts.refresh(wanted_hosts(self._linked.policy)):
                self._publish(hosts_only=True)

    async def _watch(self) -> None:
        """Wake `_follow` at file events. Everything here may fail: the regular look finds the change all the same."""
        while True:
            with contextlib.suppress(OSError, RuntimeError):
                inode = _inode(self._path)
                events = awatch(
                    self._path,
                    watch_filter=None,
                    recursive=False,
                    debounce=50,
                    step=20,
                    rust_timeout=1000,
                    yield_on_timeout=True,
                )
                async with contextlib.aclosing(events):
                    async for changes in events:
                        if changes:
                            self._stirred.set()
                        if _inode(self._path) != inode:
                            break  # another folder of that name: the old watch will never speak again
            self._stirred.set()
            await asyncio.sleep(self._poll_s)

    def _publish(self, *, hosts_only: bool = False) -> None:
        policy = self._hosts.applied(self._linked.policy, self._published)
        notes = self._linked.notes + tuple(
            Note(str(self._path), 0, "", f"the backend {name} cannot be resolved: {why}")
            for name, why in sorted(self._hosts.failed.items())
        )
        fresh = not self.status.generation or policy is not self._published
        same = not fresh or (self.status.generation and policy == self._published and notes == self.status.notes)
        status = self.status if hosts_only else replace(self.status, ok=True, errors=(), loaded_at_s=time.time())
        self.status = replace(
            status,
            notes=notes,
            generation=self.status.generation + (not same),
            tokens=len(policy.tokens),
            quotas=len(policy.quotas),
            endpoints=len(policy.endpoints),
        )
        if not same:
            self._published = policy
            self._on_policy(policy, notes)

    def _failed(self, errors: PolicyErrors) -> None:
        known = self.status.errors
        self.status = replace(self.status, ok=False, errors=errors.errors, failed_loads=self.status.failed_loads + 1)
        if known != errors.errors and self._on_error is not None:
            self._on_error(errors)


async def _in(thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, call)


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
