"""Leader election on a coordination.k8s.io Lease, for one writer among replicas.

Held means: an acknowledged write less than `renew_s` ago, by our own monotonic clock, counted from before it was sent.
Others may take the lease only `lease_s` after they saw its last change, so for `lease_s - renew_s` nobody leads, and a
write still under way can end. `fence()` gives the seconds left or raises `NotLeaderError`: `Client.fenced(lease.fence)`
asks it before every write and bounds the write by it, so a leader that was paused (SIGSTOP, a frozen VM) sends nothing
when it wakes, even before its task is cancelled.

Life cycle: `run(leading)` stands for election until cancelled. `leading()` is a task while we lead: cancelled when
the lease is lost, started again after `retry_s` if it ends or fails by itself. On cancel it is stopped first, then
the lease is handed back, so that another takes over within `retry_s`. Clocks of the machines are never compared.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from controller.kube.backoff import spread_s
from controller.kube.client import Client, Object
from controller.kube.errors import AlreadyExistsError, ConflictError, KubeError, NotFoundError, NotLeaderError
from controller.kube.metrics import LeaseStats
from controller.kube.resource import LEASES

LEASE_S, RENEW_S, RETRY_S = 15.0, 10.0, 2.0

_log = structlog.get_logger(__name__)


class Lease:
    """One candidate. `identity` must differ between replicas and starts (pod name and a random part)."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        name: str,
        identity: str,
        *,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not retry_s < renew_s < lease_s or lease_s < 1:
            raise ValueError("a lease needs retry_s < renew_s < lease_s, and lease_s of at least 1")
        self.identity, self.holder = identity, ""
        self.stats = LeaseStats()
        self._client, self._namespace, self._name = client, namespace, name
        self._lease_s, self._renew_s, self._retry_s, self._clock = lease_s, renew_s, retry_s, clock
        self._held_until = float("-inf")  # moves forward only by an acknowledged write
        self._ending_since: float | None = None
        self._seen = ("", 0.0)  # resourceVersion of another's lease, and when we saw it first

    @property
    def is_leader(self) -> bool:
        return self._clock() < self._held_until

    @property
    def ending_s(self) -> float:
        """For how long the tasks of a lost leadership have not ended; 0 while none is ending. They write nothing."""
        return 0.0 if self._ending_since is None else self._clock() - self._ending_since

    def fence(self) -> float:
        """Seconds that the lease still holds; raises `NotLeaderError`."""
        left_s = self._held_until - self._clock()
        if left_s <= 0:
            raise NotLeaderError(f"{self.identity} does not hold the lease {self._namespace}/{self._name}")
        return left_s

    async def run(self, leading: Callable[[], Awaitable[None]]) -> None:
        """Stand for election for ever."""
        task: asyncio.Task[None] | None = None
        restart_at = 0.0
        try:
            while True:
                if self.is_leader or task is None:
                    await self._try()
                # A lease that ran out and can be had again still ends the task: others may have led meanwhile.
                if not self.is_leader:
                    if task is not None:
                        self.stats.lost += 1
                        _log.warning("leadership lost", lease=self._name, holder=self.holder)
                        self._ending_since = self._clock()
                        await _end(task)
                        task = self._ending_since = None
                elif task is None and self._clock() >= restart_at:
                    self.stats.elected += 1
                    _log.info("leading", lease=self._name, identity=self.identity)
                    task = asyncio.create_task(_led(leading), name=f"leading {self._name}")
                elif task is not None and task.done():
                    self._ended(task)
                    task, restart_at = None, self._clock() + self._retry_s
                await self._wait(task)
        finally:
            if task is not None:
                await _end(task)
            await self._release()

    async def _wait(self, task: asyncio.Task[None] | None) -> None:
        """Until the next try: a leader wakes by the end of its lease, a stranger out of step with others."""
        if task is None:
            await asyncio.sleep(self._retry_s * spread_s(0.8, 1.2))
        else:
            await asyncio.sleep(max(0.0, min(self._retry_s, self._held_until - self._clock())))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.stats.task_errors += 1
        error = None if task.cancelled() else task.exception()
        _log.error("the leader's task ended by itself, it is started again", lease=self._name, exc_info=error)

    async def _try(self) -> None:
        """One round, bounded so that a dead connection leaves time for another one before the lease ends."""
        left_s, round_s = self._held_until - self._clock(), self._renew_s / 3
        try:
            async with asyncio.timeout(min(left_s, round_s) if left_s > 0 else self._renew_s):
                if await self._round():
                    self.stats.renewals += 1
                else:
                    self._held_until = float("-inf")
        except TimeoutError:
            self.stats.errors += 1
            _log.warning("lease unreachable", lease=self._name, error="timed out")
        except ConflictError:
            # Someone else wrote first. Whether it was an election or a label, the next read tells; we keep what we had.
            self.stats.errors += 1
        except KubeError as error:
            self.stats.errors += 1
            _log.warning("lease unreachable", lease=self._name, error=str(error))

    async def _round(self) -> bool:
        """Read, and write if the lease is ours, free or run out. True: acknowledged as ours."""
        asked = self._clock()
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": math.ceil(self._lease_s),
            "renewTime": now,
        }
        try:
            lease = await self._client.get(LEASES, self._name, self._namespace)
        except NotFoundError:
            body = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": mine | {"acquireTime": now, "leaseTransitions": 0},
            }
            try:
                await self._client.create(LEASES, body)
            except AlreadyExistsError:
                return False
            self._hold(asked)
            return True
        spec: Object = lease.setdefault("spec", {})
        holder = spec.get("holderIdentity") or ""
        if holder not in {"", self.identity} and not self._run_out(lease, asked):
            self.holder = holder
            return False
        if holder != self.identity:
            spec |= {"acquireTime": now, "leaseTransitions": spec.get("leaseTransitions", 0) + 1}
        spec |= mine
        await self._client.replace(LEASES, lease)  # its resourceVersion makes the write exclusive
        self._hold(asked)
        return True

    def _hold(self, asked: float) -> None:
        self._held_until, self.holder = asked + self._renew_s, self.identity

    def _run_out(self, lease: Object, now: float) -> bool:
        """Another's lease did not change for its own duration, by our clock."""
        version = lease["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, now)
        duration_s = lease["spec"].get("leaseDurationSeconds") or self._lease_s
        return now - self._seen[1] >= float(duration_s)

    async def _release(self) -> None:
        """Give back what we hold; whoever cannot be reached will see it run out."""
        if not self.is_leader:
            return
        self._held_until = float("-inf")
        try:
            async with asyncio.timeout(self._retry_s):
                lease = await self._client.get(LEASES, self._name, self._namespace)
                if lease["spec"].get("holderIdentity") == self.identity:
                    lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._client.replace(LEASES, lease)
                    self.stats.released += 1
        except (KubeError, TimeoutError) as error:
            _log.warning("lease not handed back", lease=self._name, error=str(error))


async def _led(leading: Callable[[], Awaitable[None]]) -> None:
    await leading()


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel and wait; its own failure is logged, a cancellation of ours goes on."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and task.exception() is not None:
        _log.error("the leader's task failed while it was stopped", exc_info=task.exception())
