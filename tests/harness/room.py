"""A network of its own for programs whose ports are fixed or which need an address that is not loopback.

    with NetworkRoom(folder, address="10.254.0.1", folders={"/certs": path}) as room:
        room.admit(port)                         127.0.0.1:port inside leads to 127.0.0.1:port of this machine
        process = room.spawn(["envoy-gateway", ...], log, environ)       ends with the room at the latest
        path = room.reach("10.254.0.1", 80)      unix socket that leads to this address inside
        path = room.reach_unix("/run/x.sock")    nothing to do: unix sockets are files, and files are shared
        room.forward("10.96.0.7:80", ["10.254.0.9:8080"])                connections inside go on to one of these

The room is a process in a user, network and mount namespace that it makes itself, so no rights are needed where the
kernel lets users make them; `NoRoomError` where it does not. Inside there is loopback with all of the /24s that hold
`address` and `more`, and the machine's files with `folders` added at paths that the machine need not have. Bytes cross
the border through unix sockets. All that ran inside ends with it: it is the first process of a PID namespace too. Any
thread may call.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import Any, Self

READY_TIMEOUT_S = 60.0
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _IFF_UP = 0x8914, 0x8916, 0x891C, 1
_PR_SET_PDEATHSIG = 1


class NoRoomError(Exception):
    """This machine does not let us make namespaces."""


class Resident:
    """A program inside the room."""

    def __init__(self, room: NetworkRoom, number: int, log: Path) -> None:
        self._room, self._number, self.log = room, number, log

    def signal(self, number: int) -> None:
        self._room._ask(op="signal", process=self._number, number=number)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        found: int | None = self._room._ask(op="poll", process=self._number)["code"]
        return found

    def end(self, timeout_s: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + timeout_s
        while self.exit_code is None:
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
            time.sleep(0.02)


class NetworkRoom:
    def __init__(
        self, folder: Path, address: str, folders: Mapping[str, Path] | None = None, more: Sequence[str] = ()
    ) -> None:
        self.folder, self.address, self._folders = folder, address, dict(folders or {})
        self._addresses = [address, *more]
        self._process: subprocess.Popen[str] | None = None
        self._sockets = 0
        self._one_asks = threading.Lock()
        self._outside: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        folders = {where: str(what) for where, what in self._folders.items()}
        plan = {"root": str(self.folder / "root"), "addresses": self._addresses, "folders": folders}
        command = [sys.executable, "-m", "tests.harness.room", json.dumps(plan)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        try:
            self._ask(op="ready")
        except NoRoomError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything inside, then the way in."""
        for each in self._outside:
            each.kill()
            each.wait()
        self._outside.clear()
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            self._process = None

    def spawn(self, command: Sequence[str | Path], log: Path, environ: Mapping[str, str] | None = None) -> Resident:
        """Start a program; its output goes to `log`."""
        given = {**os.environ, **(environ or {})}
        answer = self._ask(op="spawn", command=[str(part) for part in command], log=str(log), environ=given)
        return Resident(self, answer["process"], log)

    def reach(self, host: str, port: int) -> Path:
        """A unix socket here that leads to host:port there."""
        path = self._path()
        self._ask(op="link", listen=f"unix:{path}", target=f"{host}:{port}")
        return path

    def forward(self, listen: str, targets: Sequence[str]) -> None:
        """In place of what was said of `listen` before. Without targets, connections there are refused."""
        self._ask(op="forward", listen=listen, targets=list(targets))

    def admit(self, port: int) -> None:
        """127.0.0.1:port there leads to 127.0.0.1:port here."""
        path = self._path()
        command = [sys.executable, "-m", "tests.harness.room", "--link", f"unix:{path}", f"127.0.0.1:{port}"]
        self._outside.append(subprocess.Popen(command, cwd=Path(__file__).parents[2]))
        until = time.monotonic() + READY_TIMEOUT_S
        while not path.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"no way in for port {port}")
            time.sleep(0.02)
        self._ask(op="link", listen=f"127.0.0.1:{port}", target=f"unix:{path}")

    def _path(self) -> Path:
        self._sockets += 1
        return self.folder / f"{self._sockets}.sock"

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_asks:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise NoRoomError("the room's process ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NoRoomError(answer["error"]) if request["op"] == "ready" else RuntimeError(answer["error"])
        return answer


# -- inside -----------------------------------------------------------------------------------------------------------


def _checked(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _enter_namespaces() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    spaces = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET
    # Root may lack what makes a user namespace, and needs none.
    if user == 0 and libc.unshare(spaces) == 0:
        return
    _checked(libc.unshare(spaces | _CLONE_NEWUSER), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(source: str, target: str, kind: str | None = None, flags: int = _MS_BIND | _MS_REC) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    named = kind.encode() if kind else None
    _checked(libc.mount(source.encode(), target.encode(), named, flags, None), f"mount {target}")


def _build_root(root: Path, folders: Mapping[str, str]) -> None:
    """Everything that / holds, and `folders`; then make it our root."""
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    _furnish(Path("/"), root, {Path(where).resolve(): what for where, what in folders.items()})
    here = Path.cwd()
    os.chroot(root)
    os.chdir(here)


def _furnish(source: Path, place: Path, folders: Mapping[Path, str]) -> None:
    """The folders and links that `source` holds, if it is there, and `folders` in their places below it."""
    place.mkdir(parents=True, exist_ok=True)
    opened = {source / where.relative_to(source).parts[0] for where in folders}
    for entry in source.iterdir() if source.is_dir() else ():
        if entry in opened:
            continue
        if entry.is_symlink():
            (place / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            (place / entry.name).mkdir(exist_ok=True)
            _mount(str(entry), str(place / entry.name))
    for entry in opened:
        if entry in folders:
            (place / entry.name).mkdir(exist_ok=True)
            _mount(folders[entry], str(place / entry.name))
        else:
            below = {where: what for where, what in folders.items() if where.is_relative_to(entry)}
            _furnish(entry, place / entry.name, below)


def _build_network(addresses: Sequence[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def of(name: str, ip: str) -> bytes:
            return struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(ip))

        ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
        for number, address in enumerate(addresses, 1):
            ioctl(control, _SIOCSIFADDR, of(f"lo:{number}", address))
            ioctl(control, _SIOCSIFNETMASK, of(f"lo:{number}", "255.255.255.0"))
    # Ports below 1024 too, whoever we are.
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")


class _Inside:
    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: list[asyncio.Server] = []
        self._forwards: dict[str, tuple[asyncio.Server, list[str]]] = {}

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["op"]:
            case "spawn":
                with Path(request["log"]).open("ab") as log:  # noqa: ASYNC230 - a local file
                    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                        request["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=request["environ"]
                    )
                self._processes[process.pid] = process
                return {"process": process.pid}
            case "poll":
                return {"code": self._processes[request["process"]].poll()}
            case "signal":
                self._processes[request["process"]].send_signal(request["number"])
            case "link":
                self._servers.append(await _link(request["listen"], [request["target"]]))
            case "forward":
                await self._forward(request["listen"], request["targets"])
        return {}

    async def _forward(self, listen: str, targets: list[str]) -> None:
        known = self._forwards.get(listen)
        if known is not None and targets:
            known[1][:] = targets
        elif known is not None:
            del self._forwards[listen]
            known[0].close()
        elif targets:
            self._forwards[listen] = (await _link(listen, targets), targets)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 20)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            try:
                told = await self.answer(json.loads(line))
            except (OSError, KeyError) as error:
                told = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(told), flush=True)
        for process in self._processes.values():
            process.terminate()
        until = time.monotonic() + 5
        running = list(self._processes.values())
        while any(process.poll() is None for process in running) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def _link(listen: str, targets: list[str]) -> asyncio.Server:
    """`targets` are taken in turn; the list may be changed."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = targets.pop(0)
        targets.append(target)
        try:
            there, back = await _opened(target)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pipe(reader, back), _pipe(there, writer))
        back.close()
        writer.close()

    if listen.startswith("unix:"):
        return await asyncio.start_unix_server(accepted, listen.removeprefix("unix:"))
    host, _, port = listen.rpartition(":")
    return await asyncio.start_server(accepted, host, int(port))


async def _opened(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.startswith("unix:"):
        return await asyncio.open_unix_connection(target.removeprefix("unix:"))
    host, _, port = target.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """One direction until its end; a reset there is a reset here."""
    try:
        while chunk := await source.read(1 << 16):
            sink.write(chunk)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()
    except OSError:
        sink.transport.abort()


async def _link_for_ever(listen: str, target: str) -> None:
    async with await _link(listen, [target]) as server:
        await server.serve_forever()


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if sys.argv[1] == "--link":
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_link_for_ever(sys.argv[2], sys.argv[3]))
        return
    plan = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is for the test run, which closes us
    try:
        _enter_namespaces()
    except OSError as error:
        print(json.dumps({"error": f"no namespaces here: {error}"}), flush=True)
        return
    child = os.fork()  # only a child is in the new PID namespace
    if child:
        os.close(0)
        os.waitpid(child, 0)
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _build_root(Path(plan["root"]), plan["folders"])
        _build_network(plan["addresses"])
    except OSError as error:
        print(json.dumps({"error": f"no room here: {error}"}), flush=True)
        return
    asyncio.run(_Inside().run())


if __name__ == "__main__":
    _main()
