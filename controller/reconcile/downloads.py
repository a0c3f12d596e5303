"""How far running downloads are: the last line of their loaders' logs, asked for now and then.

A loader writes a line every few seconds. Its model's status follows at most once in `PROGRESS_S`, so that a cluster
that loads many models costs the API server next to nothing: one small log request and one small write each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from controller.kube.client import Client
from controller.kube.errors import KubeError
from controller.kube.resource import Key
from controller.models.report import Report, parse_report

PROGRESS_S: Final = 10.0
LOG_LINES: Final = 3
LOG_TAIL_BYTES: Final = 8192
LOG_TIMEOUT_S: Final = 3.0
"""a node that is gone answers nobody: its models must not hold up the loop of all others"""


class _Heard(NamedTuple):
    at_s: float
    report: Report | None


class Downloads:
    """What running loaders said last, by model. One per leadership; whatever else wakes a model's loop asks nobody."""

    def __init__(
        self, client: Client, every_s: float = PROGRESS_S, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._client, self._every_s, self._now_s = client, every_s, now_s
        self._heard: dict[Key, _Heard] = {}

    async def progress(self, model: Key, pods: Sequence[str]) -> Report | None:
        """How far these pods are together; the last word of theirs while they are not to be asked, or cannot be."""
        last = self._heard.get(model)
        if not pods or (last is not None and self._now_s() < last.at_s + self._every_s):
            return last.report if last is not None else None
        reports = [report for pod in pods if (report := await self._ask(model.namespace, pod)) is not None]
        found = together(reports) or (last.report if last is not None else None)
        self._heard[model] = _Heard(self._now_s(), found)
        return found

    def due_s(self, model: Key) -> float:
        """Seconds until its pods are asked again."""
        last = self._heard.get(model)
        return max(0.0, last.at_s + self._every_s - self._now_s()) if last is not None else 0.0

    def forget(self, model: Key) -> None:
        self._heard.pop(model, None)

    async def _ask(self, namespace: str, pod: str) -> Report | None:
        try:
            text = await self._client.log(
                namespace, pod, "worker", lines=LOG_LINES, limit_bytes=LOG_TAIL_BYTES, timeout_s=LOG_TIMEOUT_S
            )
        except KubeError:
            return None
        return parse_report(text.decode(errors="replace"))


def together(reports: Sequence[Report]) -> Report | None:
    """One loader's report as it is; the sum of several, of those that know what there is to load."""
    known = [each for each in reports if each.files_total is not None] or list(reports[:1])
    if len(known) <= 1:
        return known[0] if known else None
    totals = [each.bytes_total for each in known]
    return Report(
        state="loading",
        bytes_done=sum(each.bytes_done for each in known),
        bytes_total=None if None in totals else sum(filter(None, totals)),
        files_done=sum(each.files_done for each in known),
        files_total=sum(each.files_total or 0 for each in known),
        bytes_per_second=sum(each.bytes_per_second for each in known),
    )


def percent(report: Report) -> int | None:
    """Of the bytes; 100 only when all are there."""
    return min(100, report.bytes_done * 100 // report.bytes_total) if report.bytes_total else None


def fields(report: Report) -> dict[str, int] | None:
    """`status.progress` of a model; None before its source was listed."""
    if report.files_total is None:
        return None
    told = {
        "percent": percent(report),
        "bytesDone": report.bytes_done,
        "bytesTotal": report.bytes_total,
        "filesDone": report.files_done,
        "filesTotal": report.files_total,
    }
    return {key: value for key, value in told.items() if value is not None}


def words(report: Report) -> str:
    """The same for people, as a condition's message."""
    if report.files_total is None:
        return f"{report.state}: {report.message}" if report.message else report.state
    done, total = report.bytes_done, report.bytes_total
    size = f"{_size(done)} of {_size(total)}" if total is not None else _size(done)
    parts = [size, f"{report.files_done} of {report.files_total} files"]
    if report.bytes_per_second:
        parts.append(f"{_size(report.bytes_per_second)}/s")
    share = percent(report)
    return f"{report.state}: {f'{share} % ' if share is not None else ''}({', '.join(parts)})"


def _size(count: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.1f} KiB"
