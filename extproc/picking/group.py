"""Group: the fit engines of one endpoint, kept ready so that a pick allocates nothing.

Smooth weighted round robin over the routes that have a fit engine: exact shares over any run, no bursts. Least
in-flight within the route, ties broken by rotation. Everything that depends on health or weights is computed when these
change (`rebuild`), not when a request asks.
"""

from collections.abc import Iterable

from extproc.picking.engine import Engine
from extproc.picking.model import Pick

_FALLBACKS = 2


class Lane:
    """One route that may be drawn, with its fit engines."""

    __slots__ = ("credit", "engines", "name", "picks", "ring", "turn", "weight")

    def __init__(self, name: str, weight: int, engines: tuple[Engine, ...]) -> None:
        self.name = name
        self.weight = weight
        self.engines = engines
        """fit or not"""
        self.ring: list[tuple[Engine, Pick]] = []
        """the fit ones, twice in a row, so that a rotation needs no modulo"""
        self.picks = 0
        self.turn = 0
        self.credit = 0

    def choose(self) -> Pick:
        """Least in-flight, from where the last choice left off. The lane must have a fit engine."""
        count = self.picks
        turn = self.turn + 1
        if turn >= count:
            turn = 0
        ring = self.ring
        engine, best = ring[turn]
        chosen = turn
        least = engine.in_flight
        # An idle engine cannot be beaten.
        left = count
        while least and left > 1:
            left -= 1
            turn += 1
            engine, pick = ring[turn]
            if engine.in_flight < least:
                least = engine.in_flight
                best = pick
                chosen = turn
        self.turn = chosen if chosen < count else chosen - count
        return best


class Group:
    """An endpoint's lanes. Weight 0 has no lane at all: it is neither drawn nor a fallback."""

    __slots__ = ("_lanes", "_live", "_total")

    def __init__(self, routes: Iterable[tuple[str, int, tuple[Engine, ...]]]) -> None:
        self._lanes = [Lane(name, weight, engines) for name, weight, engines in routes if weight > 0]
        self._live: list[Lane] = []
        self._total = 0
        for engine in self.engines():
            engine.groups.append(self)
        self.rebuild()

    def engines(self) -> list[Engine]:
        """Each once."""
        return list(dict.fromkeys(engine for lane in self._lanes for engine in lane.engines))

    def pick(self) -> Pick | None:
        """None: nothing here is fit."""
        live = self._live
        if len(live) == 1:
            return live[0].choose()
        if not live:
            return None
        best = live[0]
        most = -1 << 62
        for lane in live:
            lane.credit = credit = lane.credit + lane.weight
            if credit > most:
                most = credit
                best = lane
        best.credit -= self._total
        return best.choose()

    def spare(self, engine: Engine) -> bool:
        """Whether another engine than this is fit."""
        return any(each.usable and each is not engine for lane in self._lanes for each in lane.engines)

    def rebuild(self) -> None:
        """After any engine's `usable` changed."""
        fit = {lane: [each for each in lane.engines if each.usable] for lane in self._lanes}
        self._live = [lane for lane in self._lanes if fit[lane]]
        self._total = sum(lane.weight for lane in self._live)
        for lane, own in fit.items():
            others = [each for other in self._live if other is not lane for each in fit[other]]
            ring = [(engine, _pick(lane.name, index, own, others)) for index, engine in enumerate(own)]
            lane.ring = ring * 2
            lane.picks = len(ring)
            if not own:
                lane.credit = 0


def _pick(route: str, index: int, own: list[Engine], others: list[Engine]) -> Pick:
    """Fallbacks from the same route first, each engine's own next ones, so that a dead one's load spreads."""
    addresses = [own[index].address]
    for pool, begin in ((own, index + 1), (others, index)):
        for step in range(len(pool)):
            if len(addresses) > _FALLBACKS:
                break
            address = pool[(begin + step) % len(pool)].address
            if address not in addresses:
                addresses.append(address)
    return Pick(tuple(addresses), route)
