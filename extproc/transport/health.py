"""grpc.health.v1 for either server end: Check and Watch over a table of names (gRPC's health checking protocol).

The messages are one field each, so they are coded here by hand. Watchers hear of every change. `drain` says NOT_SERVING
for every name and ends the watches, which would otherwise keep a draining server waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.core import CloseReason, GrpcError, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.transport.core import Services

_SERVING: Final = b"\x08\x01"
_NOT_SERVING: Final = b"\x08\x02"
_SERVICE_UNKNOWN: Final = b"\x08\x03"
_NOT_FOUND: Final = 5
_INVALID_ARGUMENT: Final = 3
_UNAVAILABLE: Final = 14


def _service_name(message: bytes) -> str:
    """Field 1 of HealthCheckRequest; other fields are none of ours."""
    name = b""
    pos = 0
    try:
        while pos < len(message):
            if message[pos] & 7 != 2 or message[pos + 1] > 127:
                raise GrpcError(_INVALID_ARGUMENT, "not a HealthCheckRequest")
            end = pos + 2 + message[pos + 1]
            if end > len(message):
                raise GrpcError(_INVALID_ARGUMENT, "not a HealthCheckRequest")
            if message[pos] >> 3 == 1:
                name = message[pos + 2 : end]
            pos = end
        return name.decode()
    except (IndexError, UnicodeDecodeError):
        raise GrpcError(_INVALID_ARGUMENT, "not a HealthCheckRequest") from None


class Health:
    """Which services serve. The empty name stands for the whole server."""

    def __init__(self, names: Iterable[str], *, serving: bool = True) -> None:
        self._serving = dict.fromkeys(["", *names], serving)
        self._watches: dict[_Watch, str] = {}
        self._draining = False

    @property
    def services(self) -> Services:
        return {
            "/grpc.health.v1.Health/Check": lambda stream: _Check(self, stream),
            "/grpc.health.v1.Health/Watch": lambda stream: _Watch(self, stream),
        }

    def set(self, name: str, *, serving: bool) -> None:
        """Nothing serves again once `drain` was called."""
        if self._draining:
            return
        changed = self._serving.get(name) is not serving
        self._serving[name] = serving
        if changed:
            for watch, watched in self._watches.items():
                if watched == name:
                    watch.tell()

    def drain(self) -> None:
        for name in self._serving:
            self.set(name, serving=False)
        self._draining = True
        for watch in list(self._watches):
            watch.stream.finish(_UNAVAILABLE, "draining")

    def status(self, name: str) -> bytes:
        serving = self._serving.get(name)
        return _SERVICE_UNKNOWN if serving is None else _SERVING if serving else _NOT_SERVING

    def watch(self, watch: _Watch, name: str) -> None:
        self._watches[watch] = name
        if self._draining:
            watch.stream.finish(_UNAVAILABLE, "draining")

    def unwatch(self, watch: _Watch) -> None:
        self._watches.pop(watch, None)


class _Check:
    def __init__(self, health: Health, stream: Stream) -> None:
        self._health = health

    def on_message(self, message: bytes) -> bytes | None:
        status = self._health.status(_service_name(message))
        if status == _SERVICE_UNKNOWN:
            raise GrpcError(_NOT_FOUND, "unknown service")
        return status

    def on_half_close(self) -> None: ...

    def on_deadline(self) -> bool:
        return False

    def on_close(self, reason: CloseReason) -> None: ...


class _Watch:
    def __init__(self, health: Health, stream: Stream) -> None:
        self._health = health
        self.stream = stream
        self._name: str | None = None
        self._told = b""

    def on_message(self, message: bytes) -> bytes | None:
        if self._name is not None:
            raise GrpcError(_INVALID_ARGUMENT, "one request per watch")
        self._name = _service_name(message)
        self._told = self._health.status(self._name)
        self.stream.send(self._told)
        self._health.watch(self, self._name)
        return None

    def tell(self) -> None:
        status = self._health.status(self._name or "")
        if status != self._told:
            self._told = status
            self.stream.send(status)

    def on_half_close(self) -> bool:
        return True

    def on_deadline(self) -> bool:
        return False

    def on_close(self, reason: CloseReason) -> None:
        self._health.unwatch(self)
