"""Faults: the ways in which a simulated engine misbehaves on purpose.

Three sources, the later wins: the process's flags, `POST /sim/faults` at run time, and the request's own `x-sim-fault`
header where the engine was started to heed it. One text form serves flags and header: `name=value,name=value`; a bare
name means true. The run-time form is the same record as JSON.
"""

from collections.abc import Callable, Hashable
from typing import Literal

import msgspec


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All off by default. "Chunks" are content events, one per token; the role event is not one."""

    times: int = 0
    """only the first so many requests after these faults were set; 0: all"""
    status: int = 0
    """answer with this status and an error body"""
    queue_full: bool = False
    """the engine's own refusal of a full queue"""
    close: bool = False
    """close the connection without a response"""
    first_byte_delay_ms: float = 0.0
    """withhold status and headers"""
    hold: bool = False
    """withhold them until the run-time faults are set again"""
    reset_after_chunks: int | None = None
    """connection reset; 0: right after the headers. A plain answer is reset in the middle of its body."""
    stall_after_chunks: int | None = None
    """go silent until the client leaves"""
    error_after_chunks: int | None = None
    """an error event, then [DONE]; a plain answer becomes a 500"""
    cut_every_bytes: int = 0
    """deliver the body in pieces of so many bytes, each in a write of its own"""
    cut_at: tuple[int, ...] = ()
    """deliver the body in pieces that end at these offsets (over HTTP header: `cut_at=10:20`)"""
    gzip: bool = False
    usage: Literal["", "own", "finish", "continuous", "never"] = ""
    """another placement of usage in streams than the process's"""
    no_usage: bool = False
    """no usage anywhere, plain answers included"""
    crlf: bool = False
    """event lines end in CRLF"""
    comments: bool = False
    """an SSE comment before every event"""
    content_length_delta: int = 0
    """a plain answer's content-length is wrong by so much, then the connection closes"""
    health_status: int = 0
    """what /health and its like answer instead of 200"""


NO_FAULTS = Faults()
_DEFAULTS = msgspec.structs.asdict(NO_FAULTS)


def parse_faults(text: str) -> Faults:
    """`name=value,name` → Faults.

    Raises:
        ValueError: for an unknown name or a value of the wrong type; the message names it.
    """
    values: dict[str, object] = {}
    for item in text.split(","):
        name, given, value = item.strip().partition("=")
        if not name:
            continue
        if name == "cut_at":
            values[name] = value.split(":")
        else:
            values[name] = value if given else True
    return _checked(values)


def faults_from_json(body: bytes) -> Faults:
    """Raises ValueError for anything that is no faults record."""
    try:
        values = msgspec.json.decode(body or b"{}", type=dict[str, object])
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    return _checked(values)


def overlay(base: Faults, more: Faults) -> Faults:
    """`more`'s settings over `base`'s."""
    changed = {name: value for name, value in msgspec.structs.asdict(more).items() if value != _DEFAULTS[name]}
    return msgspec.structs.replace(base, **changed) if changed else base


def _checked(values: dict[str, object]) -> Faults:
    try:
        return msgspec.convert(values, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"fault: {error}") from error


class ActiveFaults:
    """The process's present faults; counts down `times`, and knows who is held until the next ones."""

    __slots__ = ("_held", "_left", "current")

    def __init__(self, faults: Faults) -> None:
        self._held: dict[Hashable, Callable[[], None]] = {}
        self.set(faults)

    def set(self, faults: Faults) -> None:
        self.current = faults
        self._left = faults.times
        held, self._held = self._held, {}
        for go_on in held.values():
            go_on()

    def hold(self, request: Hashable, go_on: Callable[[], None]) -> None:
        self._held[request] = go_on

    def forget(self, request: Hashable) -> None:
        self._held.pop(request, None)

    def take(self) -> Faults:
        """The faults of one more generation request."""
        faults = self.current
        if faults.times:
            if not self._left:
                return NO_FAULTS
            self._left -= 1
        return faults
