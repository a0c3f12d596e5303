"""Every write that a real API server saw, as it saw it: who, what, when, and how it was answered.

    api = KubeApi(audit=True)
    mark = api.audit.mark()                         a place in the log
    api.audit.writes(since=mark, user="u1")         `Write`s that were answered since, oldest first

A line may appear a moment after its answer was sent: wait for what must be there, and for silence before counting.
"""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_LINE_BYTES = 1 << 17  # longer than any line
_VERBS = ["create", "update", "patch", "delete", "deletecollection"]
_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        # With their bodies: who holds the lease from when on.
        {
            "level": "Request",
            "verbs": _VERBS,
            "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}],
        },
        {"level": "None", "users": ["system:apiserver"]},
        {"level": "Metadata", "verbs": _VERBS},
        {"level": "None"},
    ],
}


@dataclass(frozen=True, slots=True)
class Write:
    """`asked_s` and `answered_s` are by the server's wall clock."""

    user: str
    verb: str
    resource: str
    subresource: str
    namespace: str
    name: str
    status: int
    asked_s: float
    answered_s: float
    holder: str
    """of a Lease: whom this write names"""

    @property
    def made(self) -> bool:
        """Did it create the object?"""
        return self.status == 201 and not self.subresource

    @property
    def taken(self) -> bool:
        return self.status < 300


class AuditLog:
    """The log in a server's folder."""

    def __init__(self, folder: Path) -> None:
        self._policy, self._log = folder / "audit-policy.yaml", folder / "audit.log"

    def flags(self) -> list[str]:
        """What the server must be started with."""
        self._policy.write_text(yaml.safe_dump(_POLICY))
        return [
            f"--audit-policy-file={self._policy}",
            f"--audit-log-path={self._log}",
            "--audit-log-maxsize=2000",  # MB; one file, never rotated
        ]

    def mark(self) -> int:
        """Where the log ends now: behind its last whole line."""
        with self._log.open("rb") as log:
            begin = log.seek(max(0, log.seek(0, io.SEEK_END) - _LINE_BYTES))
            return begin + log.read().rfind(b"\n") + 1

    def writes(self, *, since: int = 0, until: int | None = None, user: str = "") -> list[Write]:
        """Between two marks, else to the end. `user` is the name as Kubernetes has it."""
        return [each for each in self._read(since, until) if not user or each.user == user]

    def _read(self, since: int, until: int | None) -> Iterator[Write]:
        with self._log.open("rb") as log:
            log.seek(since)
            for line in io.BytesIO(log.read(-1 if until is None else until - since)):
                if line.endswith(b"\n"):  # else it is being written
                    yield _write(json.loads(line))


def _write(event: dict[str, object]) -> Write:
    about, asked = _tree(event.get("objectRef")), _tree(event.get("requestObject"))
    return Write(
        user=str(_tree(event["user"])["username"]),
        verb=str(event["verb"]),
        resource=str(about.get("resource", "")),
        subresource=str(about.get("subresource", "")),
        namespace=str(about.get("namespace", "")),
        name=str(about.get("name", "")),
        status=int(str(_tree(event.get("responseStatus")).get("code", 0))),
        asked_s=_time(event["requestReceivedTimestamp"]),
        answered_s=_time(event["stageTimestamp"]),
        holder=str(_tree(asked.get("spec")).get("holderIdentity", "")),
    )


def _tree(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _time(text: object) -> float:
    return dt.datetime.fromisoformat(str(text)).timestamp()
