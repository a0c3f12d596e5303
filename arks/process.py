"""One child process: started so that it dies with us, its stderr passed on and its last words kept.

Children get their own process group, so that Ctrl-C in a terminal reaches only us: the order of stopping is ours.
Should we be killed outright, the kernel sends them SIGTERM (Linux). Start them from the main thread only: the kernel
watches the *thread* that started them.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence

from extproc.observe.logs import forget_stderr, scrub

LAST_LINES = 12
LINE_LIMIT = 400
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment() -> dict[str, str]:
    """Ours, without the ARKS_ variables: a part is told everything by its flags."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ARKS_")}
    return {**kept, "PYTHONUNBUFFERED": "1"}


class Child:
    """A running process, from `start` to the end of `wait`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._tail: deque[bytes] = deque(maxlen=LAST_LINES)
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdout = process.stdout
        self._relays = [asyncio.create_task(self._relay_errors(process.stderr), name=f"stderr of {name}")]

    @classmethod
    async def start(cls, name: str, command: Sequence[str], *, says_ready: bool = False) -> "Child":
        """Raises OSError where the program cannot be run. What it prints goes to our stderr, but for the first line of
        one that `says_ready`.

        Pipes, not our own stderr handed down: Envoy opens its output by path, and where that is a file, two writers
        with two offsets would overwrite each other.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
            preexec_fn=_die_with_parent,
            process_group=0,
        )
        child = cls(name, process)
        if not says_ready:
            child._relay_stdout()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    async def first_line(self, timeout_s: float) -> bytes:
        """The first line of stdout of one that `says_ready`; empty if it ends before. Raises TimeoutError."""
        line = await asyncio.wait_for(self._stdout.readline(), timeout_s)
        self._relay_stdout()
        return line

    def last_words(self) -> str:
        """The end of its stderr, without anything that looks like a secret."""
        lines = [line.decode("utf-8", "replace")[:LINE_LIMIT].rstrip() for line in self._tail]
        return scrub("\n".join(line for line in lines if line))

    def alive(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status, once its output has been read to the end. Negative: the signal that ended it."""
        status = await self._process.wait()
        # A grandchild may hold the pipe open for ever.
        await asyncio.wait(self._relays, timeout=1.0)
        for relay in self._relays:
            relay.cancel()
        return status

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`. Returns when it is gone."""
        if self.alive():
            self.signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except TimeoutError:
                self.signal(signal.SIGKILL)
        await self.wait()

    def _relay_stdout(self) -> None:
        self._relays.append(asyncio.create_task(_pass_on(self._stdout), name=f"stdout of {self.name}"))

    async def _relay_errors(self, stderr: asyncio.StreamReader) -> None:
        rest = b""
        while data := await stderr.read(65536):
            _write(data)
            *lines, rest = (rest + data).split(b"\n")
            self._tail.extend(lines)
            rest = rest[-LINE_LIMIT:]
        if rest:
            self._tail.append(rest)


async def _pass_on(reader: asyncio.StreamReader) -> None:
    while data := await reader.read(65536):
        _write(data)


def _write(data: bytes) -> None:
    try:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
    except OSError:  # its reader went, which is no reason to stop serving
        forget_stderr()
