"""What the loader says about itself: one JSON object a line.

The same object is on stdout (the pod's log), in the status file of the target folder, and at the end in the
container's termination message, so that the controller learns the revision and the cause of a failure from the pod's
status alone. `parse_report` reads any of them; text around the last report (a crash's traceback) does not hurt.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

State: TypeAlias = Literal["waiting", "listing", "checking", "loading", "finishing", "ready", "failed", "stopped"]

TERMINATION_LIMIT_BYTES = 4096  # Kubernetes cuts a termination message there


class Report(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """Totals are None until the source was listed. ``reason`` and ``field`` are set when failed."""

    state: State
    model: str = ""
    source: str = ""
    revision: str = ""
    bytes_done: int = 0
    bytes_total: int | None = None
    files_done: int = 0
    files_total: int | None = None
    bytes_per_second: int = 0
    reason: str = ""
    field: str = ""
    message: str = ""


_decode = msgspec.json.Decoder(Report).decode


def parse_report(text: str) -> Report | None:
    """The last report in a log's tail, a status file or a termination message; None where there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith('{"state"'):
            try:
                return _decode(line)
            except msgspec.DecodeError:
                continue
    return None
