"""The controller's policy stream, followed: the same shape as `FolderSource`, for a process in a cluster.

Life: `start` returns with a policy in force: the controller's, or, where it says nothing for `first_s`, the one kept in
the state folder; without either it waits, and the process is not ready. `run` follows until it is cancelled. When the
controller is away the last policy stays in force, however old; `status.loaded_at_s` is the last moment at which the
controller said that this is the policy (less what its own view was behind), so age is what grows.

A stream that breaks, is silent for `quiet_s` or does not fit (see `replica`) is opened anew, after 0.1 s, doubling to
2 s; it goes on where it was, with changes alone, where the controller still can. Each message is decoded apart, at most
128 records, so the loop is never held for long.
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from apis.policy import EMPTY, Policy
from apis.records import METHOD
from apis.wire.snapshot_pb2 import FollowRequest, FollowResponse
from extproc.snapshot import kept
from extproc.snapshot.errors import Note, PolicyError, PolicyErrors
from extproc.snapshot.files import Loaded
from extproc.snapshot.folder import Notes, SourceStatus
from extproc.snapshot.hosts import REFRESH_S, Hosts, wanted_hosts
from extproc.snapshot.replica import GapError, Replica

FIRST_S: Final = 1.0
QUIET_S: Final = 5.0
"""the controller speaks once a second"""
SAVE_S: Final = 0.5
"""after a change; a token that was revoked must not come back by a restart"""
CONFIRM_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 2.0
MAX_MESSAGE_BYTES: Final = 16 << 20
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    # Each try is a new connection: grpcio's own memory of failures would make it wait up to minutes.
    ("grpc.use_local_subchannel_pool", 1),
)

log = structlog.get_logger("extproc")


class EngineLoad(NamedTuple):
    """One engine, as the controller last saw its own metrics."""

    running: int
    waiting: int
    kv_usage: float
    healthy: bool
    ttft_s: float


class StreamSource:
    """`address`: unix:PATH or HOST:PORT. Callbacks run on the event loop, one at a time."""

    def __init__(
        self,
        address: str,
        on_policy: Callable[[Policy, Notes], None],
        on_error: Callable[[PolicyErrors], None] | None = None,
        *,
        state_dir: Path,
        on_load: Callable[[Mapping[str, EngineLoad]], None] | None = None,
        first_s: float = FIRST_S,
        quiet_s: float = QUIET_S,
        hosts: Hosts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.status = SourceStatus()
        self.loads: Mapping[str, EngineLoad] = {}
        """by ip:port; empty while the controller is away"""
        self.connections = self.resyncs = 0
        """streams that told something; states that did not fit and were asked for anew"""
        self.address, self._on_policy, self._on_error, self._on_load = address, on_policy, on_error, on_load
        self._file = state_dir / kept.FILE
        self._first_s, self._quiet_s, self._clock = first_s, quiet_s, clock
        self._hosts = hosts or Hosts()
        self._replica = Replica()
        self._published = EMPTY
        self._view_age_s = 0.0
        self._unsaved, self._new_hosts = asyncio.Event(), asyncio.Event()

    async def start(self) -> Loaded:
        """Return with a policy in force and published; cancel it to give up."""
        known = await self._load_kept()
        try:
            async with asyncio.timeout(self._first_s if known else None):
                await self._follow(once=True)
        except TimeoutError:
            assert known is not None
            self._replica.policy, confirmed_at_s = known
            log.warning("the controller is silent, serving on the kept policy", age_s=self._age_s(confirmed_at_s))
            self._publish()
            self.status = replace(self.status, loaded_at_s=confirmed_at_s)
        wanted = wanted_hosts(self._replica.policy)
        if wanted and await self._hosts.refresh(wanted):
            self._publish()
        return Loaded(self._published, self.status.notes)

    async def run(self) -> None:
        """Follow the controller until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep(), name="policy stream: kept copy")
                tasks.create_task(self._resolve(), name="policy stream: host names")
                await self._follow()
        finally:
            if self._unsaved.is_set():
                await self._save()

    # -- following ------------------------------------------------------------------------------------------------

    async def _follow(self, *, once: bool = False) -> None:
        """`once`: until a policy is in force."""
        failures = 0
        while True:
            generation = self.status.generation
            try:
                await self._connection(once=once)
                return
            except GapError as error:
                self.resyncs += 1
                self._replica.forget()
                self._failed(f"the stream does not fit: {error}")
            except TimeoutError:
                self._failed(f"the controller has been silent for {self._quiet_s:g} s")
            except grpc.aio.AioRpcError as error:
                self._failed(f"the controller cannot be followed: {error.code().name.lower().replace('_', ' ')}")
            except (OSError, DecodeError, grpc.RpcError) as error:
                self._failed(f"the controller cannot be followed: {type(error).__name__}")
            self._replica.abandon()
            failures = 1 if self.status.generation > generation else failures + 1
            pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects

    async def _connection(self, *, once: bool) -> None:
        async with grpc.aio.insecure_channel(self.address, options=OPTIONS) as channel:
            method: Any = channel.unary_stream(METHOD, request_serializer=FollowRequest.SerializeToString)
            request = FollowRequest(
                epoch=self._replica.epoch,
                generation=self._replica.generation,
                checksum=self._replica.checksum if self._replica.epoch else b"",
                follower=f"extproc/{os.getpid()}",
            )
            call = method(request)
            told = False
            while True:
                async with asyncio.timeout(self._quiet_s):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    raise ConnectionError("the controller ended the stream")
                if not told:
                    told, self.connections = True, self.connections + 1
                self._take(FollowResponse.FromString(message))
                if once and self.status.generation:
                    return

    def _take(self, response: FollowResponse) -> None:
        match response.WhichOneof("event"):
            case "part":
                if self._replica.part(response.part):
                    self._confirmed()
                    self._publish()
            case "change":
                self._replica.change(response.change)
                self._confirmed()
                self._publish()
            case "pulse":
                pulse = response.pulse
                if not pulse.ready:
                    return  # it is there, and does not know the policy yet
                if not self._replica.agrees(pulse):
                    raise GapError("the controller's checksum is another one")
                self._view_age_s = pulse.view_age_s
                self._confirmed()
            case "load":
                self.loads = {
                    each.address: EngineLoad(each.running, each.waiting, each.kv_usage, each.healthy, each.ttft_s)
                    for each in response.load.engines
                }
                if self._on_load is not None:
                    self._on_load(self.loads)
            case _:
                pass  # of a later version of the controller

    # -- what is known --------------------------------------------------------------------------------------------

    def _age_s(self, confirmed_at_s: float) -> int:
        return round(max(0.0, self._clock() - confirmed_at_s))

    def _confirmed(self) -> None:
        """The controller said that this is the policy."""
        if not self.status.ok and self.status.generation:
            log.info("following the controller", after=str(self.status.errors[0]) if self.status.errors else "")
        at_s = max(self.status.loaded_at_s, self._clock() - self._view_age_s)
        self.status = replace(self.status, ok=True, errors=(), loaded_at_s=at_s)

    def _failed(self, problem: str) -> None:
        error = PolicyError(self.address, 0, "", problem, "see that the controller runs and serves this address")
        known = self.status.errors
        self.status = replace(self.status, ok=False, errors=(error,), failed_loads=self.status.failed_loads + 1)
        self.loads = {}
        if known != (error,) and self._on_error is not None:
            self._on_error(PolicyErrors((error,)))

    def _publish(self, *, hosts_only: bool = False) -> None:
        policy = self._hosts.applied(self._replica.policy, self._published)
        notes = self._notes()
        same = self.status.generation > 0 and policy == self._published
        if same and notes == self.status.notes:
            return
        self.status = replace(
            self.status,
            notes=notes,
            generation=self.status.generation + (not same),
            tokens=len(policy.tokens),
            quotas=len(policy.quotas),
            endpoints=len(policy.endpoints),
        )
        if not hosts_only:
            self._unsaved.set()
            if wanted_hosts(policy) - self._hosts.known.keys():
                self._new_hosts.set()
        self._published = policy
        self._on_policy(policy, notes)

    def _notes(self) -> Notes:
        unread = [
            Note(f"{namespace}/{name}", 0, "", f"is left out: its record cannot be read ({why})")
            for (_, namespace, name), why in self._replica.rejected.items()
        ]
        unresolved = [
            Note(self.address, 0, "", f"the backend {name} cannot be resolved: {why}")
            for name, why in sorted(self._hosts.failed.items())
        ]
        return (*unread, *unresolved)

    async def _resolve(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._new_hosts.wait()
            self._new_hosts.clear()
            if await self._hosts.refresh(wanted_hosts(self._replica.policy)):
                self._publish(hosts_only=True)

    # -- the kept copy --------------------------------------------------------------------------------------------

    async def _load_kept(self) -> tuple[Policy, float] | None:
        try:
            return await asyncio.to_thread(kept.load, self._file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("the kept policy cannot be used", file=str(self._file), error=str(error))
            return None

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._unsaved.wait()
            if self._unsaved.is_set():
                await asyncio.sleep(SAVE_S)
                began = time.perf_counter()
                await self._save()
                # A large policy that changes all the time is not to be written all the time.
                await asyncio.sleep(20 * (time.perf_counter() - began))
            else:
                with contextlib.suppress(OSError):
                    at_s = self.status.loaded_at_s
                    await asyncio.to_thread(os.utime, self._file, (at_s, at_s))

    async def _save(self) -> None:
        self._unsaved.clear()
        try:
            await asyncio.to_thread(kept.save, self._file, self._replica.policy, self.status.loaded_at_s)
        except OSError as error:
            log.error("the policy cannot be kept", file=str(self._file), error=error.strerror)
