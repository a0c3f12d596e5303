"""One extproc process: everything the data plane is made of, put together, started in order and taken down in order.

Start: state folder (counters, leases, ledger), policy (a broken one at the first start is refused), health checks,
admin port, the gRPC listener last. Stop, on SIGTERM or SIGINT: /readyz says so, no new streams, open ones finish and
settle (at most `drain_timeout_s`; then Envoy goes on without us), the journal is written out. Exit status 0 after that,
1 where a part cannot start.
"""

import asyncio
import contextlib
import gc
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog

from apis.eds import write_eds
from apis.policy import Policy
from extproc import access_log
from extproc.exchange import Deps, Exchange
from extproc.http.admin import AdminServer, Check
from extproc.journal.errors import JournalError
from extproc.journal.model import JournalSettings
from extproc.journal.writer import Journal
from extproc.ledger.sqlite import SqliteLedger
from extproc.limits.memory import MemoryStore
from extproc.observe import names
from extproc.observe.lag import LoopLag
from extproc.observe.metrics import GatewayMetrics
from extproc.picking import Picker
from extproc.settings import ExtprocSettings
from extproc.snapshot.errors import Note, PolicyErrors
from extproc.snapshot.folder import FolderSource, Notes
from extproc.snapshot.index import LiveIndex
from extproc.snapshot.report import QuotaReport
from extproc.snapshot.stream import StreamSource
from extproc.transport import grpc_aio, h2
from extproc.transport.core import Server, Service
from extproc.transport.health import Health

__version__: Final = version("arks")

log = structlog.get_logger("extproc")

EXT_PROC: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
TICK_S: Final = 1.0
MOST_NOTES: Final = 50
"""logged at one change; /readyz has them all"""


async def run(settings: ExtprocSettings) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        return await Gateway(settings).run(stopped)
    except (PolicyErrors, JournalError, OSError) as error:
        log.error("cannot start", error=str(error))
        return 1


@contextlib.contextmanager
def _blamed_on(flags: str) -> Iterator[None]:
    """The system's reason alone does not tell which of two addresses is taken."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{flags}: {error.strerror or error}") from error


class Gateway:
    """The parts of one process and their order."""

    def __init__(self, settings: ExtprocSettings) -> None:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._settings = settings
        kept = JournalSettings(on_failure=settings.on_journal_failure, retain_days=settings.retain_days)
        self._journal = Journal(settings.state_dir, kept)
        self._ledger = ledger = SqliteLedger(self._journal)
        self._store = MemoryStore(journal=self._journal, ledger=ledger)
        self._picker = Picker()
        self._metrics = GatewayMetrics(per_token=settings.metrics_per_token)
        self._live = LiveIndex()
        self._lag = LoopLag()
        self._deps = Deps(self._live, self._store, ledger, self._picker, self._metrics)
        self._source = self._policy_source()
        self._health = Health([EXT_PROC, access_log.SERVICE])
        self._serving = self._draining = False
        self._pending: Policy | None = None
        self._notes: frozenset[Note] = frozenset()
        self._changed = asyncio.Event()
        self._engines: frozenset[str] = frozenset()
        self._untold = False
        """Envoy could not be told of the present engines"""

    async def run(self, stopped: asyncio.Event) -> int:
        """Raises PolicyErrors, JournalError or OSError where a part cannot start."""
        settings = self._settings
        admin = AdminServer(self._metrics, self._checks())
        self._watch_metrics()
        server: Server | None = None
        owned: list[asyncio.Task[None]] = []
        self._journal.start()
        try:
            host, _, port = settings.admin.rpartition(":")
            with _blamed_on(f"--admin {settings.admin}"):
                await admin.start(host.strip("[]"), int(port))
            if not await _unless(stopped, self._source.start):
                return 0
            assert self._pending is not None
            self._live.replace(self._pending)
            self._apply()
            # What is loaded now lives as long as the process: the collector need not visit it again and again.
            gc.collect()
            gc.freeze()
            # Nothing on a request's way forms cycles; the defaults would look for them every few requests.
            gc.set_threshold(50_000, 20, 100)
            for name, work in (
                ("policy source", self._source.run),
                ("policy", self._follow_policy),
                ("quota report", self._report_quotas),
                ("engine health", self._picker.run),
                ("housekeeping", self._keep_house),
                ("loop lag", self._lag.run),
            ):
                owned.append(asyncio.create_task(_lasting(name, work), name=name))
            tls = settings.tls
            files = f" with --tls-certificate {tls.certificate} and --tls-key {tls.key}" if tls is not None else ""
            with _blamed_on(f"--listen {settings.listen}{files}"):
                server = await self._listen()
            self._serving = True
            log.info("serving", listen=server.address, admin=admin.address, engines=len(self._engines))
            await stopped.wait()
            log.info("draining", open_requests=self._deps.open)
            self._serving, self._draining = False, True
            self._deps.abandoned.drain()
            await server.drain(settings.drain_timeout_s)
        finally:
            self._serving = False
            if server is not None:
                await server.close()
            self._deps.abandoned.close()
            for task in owned:
                task.cancel()
            await asyncio.gather(*owned, return_exceptions=True)
            saved = await asyncio.to_thread(self._journal.close)
            if not saved:
                log.error("usage left unsaved", state=str(settings.state_dir), queued=self._journal.status.queued)
            await admin.close()
        log.info("stopped")
        return 0

    async def _listen(self) -> Server:
        settings = self._settings
        deps = self._deps
        services: dict[str, Service] = {
            f"/{EXT_PROC}/Process": lambda _stream: Exchange(deps),
            access_log.METHOD: deps.abandoned.service,
        }
        serve = h2.serve if settings.transport == "h2" else grpc_aio.serve
        if settings.listen.startswith("unix:"):
            Path(settings.listen.removeprefix("unix:")).parent.mkdir(parents=True, exist_ok=True)
        return await serve(
            services,
            settings.listen,
            tls=settings.tls,
            health=self._health,
            max_message_bytes=settings.message_limit_bytes,
        )

    # --- policy ---------------------------------------------------------------------------------------------------

    def _policy_source(self) -> FolderSource | StreamSource:
        settings = self._settings
        if settings.policy_stream is None:
            assert settings.policy_dir is not None
            return FolderSource(settings.policy_dir, self._on_policy, self._on_policy_error)
        return StreamSource(
            settings.policy_stream, self._on_policy, self._on_policy_error, state_dir=settings.state_dir
        )

    def _on_policy(self, policy: Policy, notes: Notes) -> None:
        for note in [note for note in notes if note not in self._notes][:MOST_NOTES]:
            log.info("policy note", note=str(note))
        self._notes = frozenset(notes)
        self._pending = policy
        self._changed.set()

    def _on_policy_error(self, errors: PolicyErrors) -> None:
        if self._source.status.generation:
            log.error("policy not applied, the last good one stays", errors=str(errors))
        else:
            # Of a pod's two commands one is there first; nothing is wrong as long as the other comes.
            log.warning("waiting for the first policy", reason=str(errors))

    async def _follow_policy(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            policy = self._pending
            if policy is not None and policy is not self._live.current.policy:
                await self._live.apply(policy)
                self._apply()

    def _apply(self) -> None:
        """Tell everyone else of the policy that is now in force."""
        policy = self._live.current.policy
        self._picker.set_policy(policy.endpoints.values(), self._settings.engines)
        self._metrics.retain(policy.endpoints, policy.tokens)
        self._tell_envoy()

    def _tell_envoy(self) -> None:
        """Which engines there are. Pins that Envoy does not know go to any of those that it does."""
        engines = frozenset(state.address for state in self._picker.snapshot())
        file = self._settings.eds_file
        if engines != self._engines and file is not None:
            try:
                write_eds(file, engines)
            except OSError as error:
                if not self._untold:
                    log.error("cannot tell Envoy the engines, trying on", file=str(file), error=error.strerror)
                self._untold = True
                return
        self._engines, self._untold = engines, False

    async def _report_quotas(self) -> None:
        """To the controller; with a policy folder there is nobody who would write it down."""
        if isinstance(self._source, StreamSource):
            await QuotaReport(self._source, self._live, self._store.used).run()
        await asyncio.Event().wait()

    # --- housekeeping ---------------------------------------------------------------------------------------------

    async def _keep_house(self) -> None:
        while True:
            for _ in range(4):
                await asyncio.sleep(TICK_S / 4)
                self._metrics.count_ended()
            self._store.tick()
            if self._untold:
                self._tell_envoy()

    def _checks(self) -> dict[str, Callable[[], Check]]:
        return {
            "listener": lambda: Check(self._serving),
            "policy": self._policy_check,
            "journal": self._journal_check,
            "engines": self._engines_check,
        }

    def _policy_check(self) -> Check:
        status = self._source.status
        # A broken folder, or a controller that is away, leaves the last good policy in force: still ready, and told.
        return Check(
            status.generation > 0,
            {
                "current": status.ok,
                "generation": status.generation,
                "age_s": round(max(0.0, time.time() - status.loaded_at_s), 1) if status.loaded_at_s else None,
                "tokens": status.tokens,
                "quotas": status.quotas,
                "endpoints": status.endpoints,
                "errors": [str(error) for error in status.errors],
                "notes": [str(note) for note in status.notes],
            },
        )

    def _journal_check(self) -> Check:
        status = self._journal.status
        return Check(
            not status.refusing,
            {"writing": status.ok, "reason": status.reason, "queued": status.queued, "dropped": status.dropped},
        )

    def _engines_check(self) -> Check:
        states = list(self._picker.snapshot())
        return Check(
            not states or any(state.healthy for state in states),
            {"engines": {state.address: state.last_error or "healthy" for state in states[:100]}},
            required=False,
        )

    def _watch_metrics(self) -> None:
        watch, source, journal = self._metrics.watch, self._source, self._journal
        picker, store = self._picker, self._store
        watch(names.BUILD, lambda: [((__version__, self._settings.transport), 1)])
        watch(names.OPEN_STREAMS, lambda: self._deps.open)
        watch(names.DRAINING, lambda: float(self._draining))
        watch(names.LOOP_LAG_MAX, self._lag.take_max_s)
        watch(names.POLICY_VERSION, lambda: source.status.generation)
        watch(names.POLICY_AGE, lambda: max(0.0, time.time() - source.status.loaded_at_s))
        watch(names.POLICY_BROKEN, lambda: float(not source.status.ok))
        watch(names.POLICY_ERRORS, lambda: source.status.failed_loads)
        watch(names.JOURNAL_WORKING, lambda: float(journal.status.ok))
        watch(names.JOURNAL_QUEUED, lambda: journal.status.queued)
        watch(names.JOURNAL_DROPPED, lambda: journal.status.dropped)
        watch(names.STATE_FREE, lambda: shutil.disk_usage(self._settings.state_dir).free)
        watch(names.LEDGER_ROWS, lambda: self._ledger.written)
        watch(names.OPEN_LEASES, lambda: store.open_leases)
        watch(names.LEASES_EXPIRED, lambda: store.stats.expired)
        watch(names.QUOTA_USAGE, lambda: self._quotas(lambda key, _limit: store.used(key) + store.reserved(key)))
        watch(names.QUOTA_LIMIT, lambda: self._quotas(lambda _key, limit: limit))
        if self._settings.metrics_per_token:
            watch(names.RATE_LIMIT_TOKENS, self._left)
        watch(names.ENGINE_HEALTHY, lambda: [((state.address,), float(state.healthy)) for state in picker.snapshot()])
        watch(names.ENGINE_IN_FLIGHT, lambda: [((state.address,), state.in_flight) for state in picker.snapshot()])

    def _quotas(self, value: Callable[[str, int], int]) -> list[tuple[tuple[str, ...], float]]:
        return [
            ((namespace, name, rule.kind), value(rule.key, rule.limit))
            for (namespace, name), rules in self._live.current.quota_rules.items()
            for rule in rules
        ]

    def _left(self) -> Iterator[tuple[tuple[str, ...], float]]:
        """Of each limit that was used in its present window: namespace, token, endpoint, kind; and what is left."""
        tokens = self._live.current.policy.tokens
        for counter in self._store.counters():
            if not counter.key.startswith("rate/"):
                continue
            namespace, name, endpoint, kind = counter.key.split("/")[1:]
            token = tokens.get((namespace, name))
            for grant in token.grants if token is not None else ():
                if grant.endpoint == endpoint:
                    for rate in grant.rates:
                        if rate.kind == kind:
                            left = max(0, rate.value - counter.used - counter.reserved)
                            yield (namespace, name, endpoint, kind), left
                    break


async def _unless(stopped: asyncio.Event, work: Callable[[], Awaitable[object]]) -> bool:
    """Do it; False where `stopped` came first, and it was given up."""
    doing = asyncio.ensure_future(work())
    waiting = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            return False
        await doing
        return True
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)


async def _lasting(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run for the process's life: what fails is logged and begun again, requests go on meanwhile."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("background task failed, starting it again", task=name)
        with contextlib.suppress(TimeoutError):
            await asyncio.sleep(1.0)
