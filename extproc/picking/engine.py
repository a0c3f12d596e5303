"""Engine: what is known of one address, and how that knowledge changes. No I/O, no clock of its own.

    fit ──lost by a request, refused or 5xx to a probe, silent twice──▶ down ──answers a probe──▶ fit
     └──lost 3 times, or five 5xx in a row──▶ ejected (5 s, 10 s … 60 s) ──then answers a probe──▶ fit

An answer counts only if its probe was sent after the engine went down (`epoch`). Of the many requests that one crash
breaks, only the first finds the engine fit: a crash counts once.
"""

import math
from typing import TYPE_CHECKING

from extproc.picking.model import EngineState, HealthSettings

if TYPE_CHECKING:
    from extproc.picking.group import Group


class Engine:
    __slots__ = (
        "_settings",
        "address",
        "asked_s",
        "due_s",
        "ejected_until_s",
        "ejections",
        "epoch",
        "failures",
        "groups",
        "in_flight",
        "known",
        "last_error",
        "losses",
        "path_index",
        "probing",
        "silent",
        "usable",
    )

    def __init__(self, address: str, settings: HealthSettings) -> None:
        self.address = address
        self._settings = settings
        self.usable = True
        """a new engine is fit until proven dead"""
        self.known = False
        """in the present policy"""
        self.in_flight = 0
        self.groups: list[Group] = []
        self.failures = 0
        self.losses = 0
        self.silent = 0
        self.ejections = 0
        self.ejected_until_s = 0.0
        self.epoch = 0
        self.last_error = ""
        # The prober's own
        self.due_s = 0.0
        self.asked_s = -math.inf
        self.probing = False
        self.path_index = 0

    # Passive: what requests met. Each returns whether `usable` changed.

    def answered(self) -> None:
        """A request got an answer. That alone does not bring a down engine back: it may be older than the trouble."""
        self.failures = 0
        if self.usable:
            self.losses = 0

    def lost(self, now_s: float) -> bool:
        """A request found no engine here."""
        if not self.usable:
            return False
        self.last_error = "unreachable"
        self.losses += 1
        self._go_down()
        if self.losses >= self._settings.losses_until_ejection:
            self._eject(now_s)
        return True

    def failed(self, now_s: float, *, spare: bool) -> bool:
        """A request got a 5xx. `spare`: every endpoint here has another fit engine.

        NOTE: the last fit engine is never ejected for its answers. It does answer, and five requests that any tenant
        can make fail must not close an endpoint for all.
        """
        self.failures += 1
        if not self.usable or not spare or self.failures < self._settings.failures_until_ejection:
            return False
        self.last_error = "failed"
        self._go_down()
        self._eject(now_s)
        return True

    # Active: what a probe met.

    def probe_answered(self, now_s: float, epoch: int) -> bool:
        if epoch != self.epoch:
            return False
        self.silent = 0
        if self.usable or now_s < self.ejected_until_s:
            return False
        self.usable = True
        return True

    def probe_failed(self, reason: str, *, certain: bool) -> bool:
        """No answer, or a 5xx. `certain`: proof that it is down, not perhaps only slow."""
        self.silent += 1
        self.last_error = reason
        if not self.usable or (not certain and self.silent < self._settings.timeouts_until_down):
            return False
        self._go_down()
        return True

    def state(self, now_s: float) -> EngineState:
        ejected_for_s = max(0.0, self.ejected_until_s - now_s)
        return EngineState(self.address, self.usable, self.in_flight, ejected_for_s, self.last_error)

    def _go_down(self) -> None:
        self.usable = False
        self.epoch += 1

    def _eject(self, now_s: float) -> None:
        settings = self._settings
        # A minute of good conduct since the last ejection clears the record.
        if now_s - self.ejected_until_s > settings.max_ejection_s:
            self.ejections = 0
        self.ejected_until_s = now_s + min(settings.ejection_s * 2**self.ejections, settings.max_ejection_s)
        self.ejections += 1
        self.failures = self.losses = 0
