"""Picker: from an endpoint to an engine's address.

`set_policy` on every snapshot, `pick` + `begin` when a request goes out, `end` exactly once when it is over, `run` as
long as the process lives. One event loop, no locks. An address that stays keeps its state over policy changes; one that
goes is remembered while requests are still on it.
"""

import random
import time
from collections.abc import Callable, Iterable

import structlog

from apis.policy import Endpoint, Key
from extproc.picking.engine import Engine
from extproc.picking.group import Group
from extproc.picking.model import EngineState, HealthSettings, Outcome, Pick
from extproc.picking.prober import Prober


class Picker:
    """`clock` is monotonic seconds; `seed` fixes the probes' jitter."""

    def __init__(
        self,
        health: HealthSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._health = health or HealthSettings()
        self._clock = clock
        self._log = structlog.get_logger("picking")
        self._engines: dict[str, Engine] = {}
        self._groups: dict[Key, Group] = {}
        self._sources: dict[Key, Endpoint] = {}
        self._defaults: tuple[str, ...] = ()
        self._default_group = Group(())
        self._prober = Prober(
            self._health,
            self._clock,
            random.Random(seed),  # noqa: S311 - spreads probes, no secret
            self._probe_answered,
            self._probe_failed,
        )

    def set_policy(self, endpoints: Iterable[Endpoint], default_engines: Iterable[str] = ()) -> None:
        """Take over the endpoints of a new snapshot. Weights and addresses apply to the very next pick."""
        defaults = tuple(dict.fromkeys(default_engines))
        sources = {(each.namespace, each.name): each for each in endpoints}
        if defaults != self._defaults:
            self._retire(self._default_group)
            self._default_group = Group((("", 1, self._of(defaults)),))
            self._defaults = defaults
        for key, old in self._sources.items():
            new = sources.get(key)
            if old.routes is not None and (new is None or new.routes != old.routes):
                self._retire(self._groups[key])
        groups: dict[Key, Group] = {}
        for key, new in sources.items():
            if new.routes is None:
                groups[key] = self._default_group
                continue
            before = self._sources.get(key)
            if before is not None and before.routes == new.routes:
                # Unchanged: the rotation goes on where it was.
                groups[key] = self._groups[key]
            else:
                groups[key] = Group((route.name, route.weight, self._of(route.addresses)) for route in new.routes)
        self._groups = groups
        self._sources = sources
        self._sort_out()

    def pick(self, endpoint: Endpoint) -> Pick | None:
        """An engine for one request. None: no fit one, or the endpoint is not in the present policy."""
        group = self._groups.get((endpoint.namespace, endpoint.name))
        return None if group is None else group.pick()

    def begin(self, address: str) -> None:
        """A request goes to this address."""
        engine = self._engines.get(address)
        if engine is None:
            engine = self._engines[address] = Engine(address, self._health)
        engine.in_flight += 1

    def end(self, address: str, outcome: Outcome) -> None:
        """It is over: once for every `begin`. An `end` too many is ignored."""
        engine = self._engines.get(address)
        if engine is None or not engine.in_flight:
            return
        engine.in_flight -= 1
        if outcome is Outcome.OK:
            if engine.failures or engine.losses:
                engine.answered()
        elif outcome is Outcome.UNREACHABLE:
            if engine.lost(self._clock()):
                self._went_down(engine)
        elif outcome is Outcome.FAILED:
            spare = all(group.spare(engine) for group in engine.groups)
            if engine.failed(self._clock(), spare=spare):
                self._went_down(engine)
        if not engine.in_flight and not engine.known:
            del self._engines[address]

    def suspect(self, address: str) -> None:
        """An answer broke off, by the client or by the engine's death: ask the engine soon instead of at its turn."""
        engine = self._engines.get(address)
        if engine is not None and engine.known:
            self._prober.doubt(engine)

    async def run(self) -> None:
        """Probe the policy's engines until cancelled. Without it an engine that went down stays down."""
        await self._prober.run()

    def snapshot(self) -> list[EngineState]:
        """The present policy's engines, by address."""
        now_s = self._clock()
        return [each.state(now_s) for _, each in sorted(self._engines.items()) if each.known]

    def _of(self, addresses: Iterable[str]) -> tuple[Engine, ...]:
        found = []
        for address in dict.fromkeys(addresses):
            engine = self._engines.get(address)
            if engine is None:
                engine = self._engines[address] = Engine(address, self._health)
            found.append(engine)
        return tuple(found)

    def _retire(self, group: Group) -> None:
        for engine in group.engines():
            engine.groups.remove(group)

    def _sort_out(self) -> None:
        """Which engines are known now; forget the others unless requests are still on them."""
        wanted = dict.fromkeys(self._defaults)
        for endpoint in self._sources.values():
            for route in endpoint.routes or ():
                wanted.update(dict.fromkeys(route.addresses))
        for address, engine in list(self._engines.items()):
            known = address in wanted
            if known and not engine.known:
                self._prober.watch(engine)
            elif not known and not engine.in_flight:
                del self._engines[address]
            engine.known = known

    def _probe_answered(self, engine: Engine, epoch: int) -> None:
        if engine.probe_answered(self._clock(), epoch):
            self._log.info("engine is fit", engine=engine.address)
            self._rebuild(engine)

    def _probe_failed(self, engine: Engine, reason: str, certain: bool) -> None:
        if engine.probe_failed(reason, certain=certain):
            self._went_down(engine)

    def _went_down(self, engine: Engine) -> None:
        ejected_for_s = max(0.0, engine.ejected_until_s - self._clock())
        self._log.warning(
            "engine is down", engine=engine.address, reason=engine.last_error, ejected_for_s=round(ejected_for_s, 1)
        )
        self._rebuild(engine)
        self._prober.hurry(engine)

    def _rebuild(self, engine: Engine) -> None:
        for group in engine.groups:
            group.rebuild()
