"""Counts what is loaded and tells it: to stdout, to the status file, at the end to the termination message.

Counters are plain numbers that the transfers add to; `telling` is the one task that reads them, every few seconds. A
volume that takes no status file (it may be full) does not stop a load: the lines on stdout remain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec

from controller.models.errors import LoadError
from controller.models.report import TERMINATION_LIMIT_BYTES, Report, State
from controller.models.tree import Tree

STATUS_FILE = ".arks-status.json"
_RATE_OVER_S = 15.0
_ENDS = ("ready", "failed", "stopped")


class Progress:
    """``say`` takes one line."""

    def __init__(
        self, model: str, source: str, say: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.state: State = "listing"
        self.message = ""
        self.revision = ""
        self.bytes_done = 0
        self.bytes_total: int | None = None
        self.files_done = 0
        self.files_total: int | None = None
        self.loaded_bytes = 0  # over the network, by this process
        self.folder: Tree | None = None
        self._model = model
        self._source = source
        self._say = say
        self._now = now
        self._last: Report | None = None
        self._samples: deque[tuple[float, int]] = deque([(now(), 0)])

    def report(self, *, reason: str = "", field: str = "") -> Report:
        return Report(
            state=self.state,
            model=self._model,
            source=self._source,
            revision=self.revision,
            bytes_done=self.bytes_done,
            bytes_total=self.bytes_total,
            files_done=self.files_done,
            files_total=self.files_total,
            bytes_per_second=self._rate(),
            reason=reason,
            field=field,
            message=self.message,
        )

    def fail(self, error: BaseException) -> Report:
        """The last word of a load that did not end ready."""
        if isinstance(error, LoadError):
            return self.tell("failed", error.message, reason=error.reason, field=error.field)
        return self.tell("stopped", "told to stop; what is loaded stays for the next run")

    def tell(self, state: State | None = None, message: str = "", *, reason: str = "", field: str = "") -> Report:
        if self._last is not None:
            return self._last  # said already, where the status file could still be written
        if state is not None:
            self.state, self.message = state, message
        told = self.report(reason=reason, field=field)
        if self.state in _ENDS:
            self._last = told
        line = msgspec.json.encode(told)
        self._say(line.decode())
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.write(STATUS_FILE, line + b"\n")
        return told

    @contextlib.asynccontextmanager
    async def telling(self, every_s: float) -> AsyncIterator[None]:
        async def repeat() -> None:
            while True:
                await asyncio.sleep(every_s)
                self.tell()

        task = asyncio.create_task(repeat())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _rate(self) -> int:
        now = self._now()
        samples = self._samples
        samples.append((now, self.loaded_bytes))
        while len(samples) > 2 and now - samples[0][0] > _RATE_OVER_S:
            samples.popleft()
        began, was = samples[0]
        return int((self.loaded_bytes - was) / (now - began)) if now > began else 0


def termination_message(report: Report) -> bytes:
    """As much of it as Kubernetes keeps."""
    line = msgspec.json.encode(report)
    if len(line) > TERMINATION_LIMIT_BYTES:
        line = msgspec.json.encode(msgspec.structs.replace(report, message=report.message[:500]))
    return line
