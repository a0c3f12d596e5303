"""From load to weights: pure, one step at a time.

    static, capacity   the weights as `desired.endpoint.discovered` has them
    load               capacity times score; a score tells how much room its engines have, against the best backend's

An engine's room: what its KV cache has left, halved by each doubling of its queue, less where its first tokens are
slower than the quickest engine's. Even load on all moves nothing, whatever its height. Scores move by `Damping`; a
backend that is dead goes to 0 at once, one that is new or comes back starts at the floor. Where all seem dead, the
fault is more likely in how we look than in all of them: capacity counts then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from apis.resources import ArksEndpoint
from controller.reconcile.desired.endpoint import MAX_WEIGHT, Backend
from controller.weights.model import Damping, EngineLoad, Share

DAMPING: Final = Damping()
_SETTLED: Final = 0.002


def weights_for(
    endpoint: ArksEndpoint,
    backends: Sequence[Backend],
    loads: Mapping[str, Sequence[EngineLoad]],
    previous: Mapping[str, Share],
    damping: Damping = DAMPING,
) -> dict[str, Share]:
    """Shares by application. `loads`: its engines, by application; `previous`: what the last step returned."""
    if endpoint.spec.weight_policy != "load":
        return {each.application: Share(each.weight) for each in backends}
    scale = _scale(endpoint, backends, damping)
    wanted = _wanted(backends, loads, damping)
    shares: dict[str, Share] = {}
    for each in backends:
        before = previous.get(each.application)
        score = _next(wanted[each.application], before, bool(previous), damping)
        full = each.weight * scale
        weight = max(1, round(full * score)) if score and full else 0
        held = before is not None and before.weight > 0 and weight > 0
        if held and before is not None and abs(weight - before.weight) < damping.band * full:
            # Still where it was; a weight above the present capacity must go, however near.
            weight = min(before.weight, full)
        shares[each.application] = Share(weight, score)
    return shares


def _scale(endpoint: ArksEndpoint, backends: Sequence[Backend], damping: Damping) -> int:
    """Routes that users wrote keep their weights, so beside them ours must keep the same measure."""
    if endpoint.spec.route_configs:
        return 1
    largest = max((each.weight for each in backends), default=1)
    return damping.scale if largest * damping.scale <= MAX_WEIGHT else 1


def _wanted(
    backends: Sequence[Backend], loads: Mapping[str, Sequence[EngineLoad]], damping: Damping
) -> dict[str, float]:
    """Scores as they would be without damping: 0, or from the floor to 1."""
    engines = {each.application: loads.get(each.application, ()) for each in backends}
    quickest = min((one.ttft_s for found in engines.values() for one in found if one.ttft_s > 0), default=0.0)
    rooms = {name: _room(found, quickest, damping) for name, found in engines.items()}
    carrying = [rooms[each.application] for each in backends if each.weight > 0]
    told = [room for room in carrying if room is not None]
    best = max(told, default=0.0)
    if best <= 0.0 and len(told) == len(carrying):
        return dict.fromkeys(rooms, 1.0)

    def score(room: float) -> float:
        return min(1.0, max(damping.floor, room / best)) if room > 0 and best > 0 else 0.0

    # Of scores, not of rooms: who is at the floor already must not pull those down that tell nothing.
    usual = sum(map(score, told)) / len(told) if best > 0 else 1.0
    return {name: max(damping.floor, usual) if room is None else score(room) for name, room in rooms.items()}


def _room(engines: Sequence[EngineLoad], quickest_s: float, damping: Damping) -> float | None:
    """Mean over the engines, dead ones counting 0; None: nothing is known."""
    rooms = []
    for engine in engines:
        if not engine.healthy:
            rooms.append(0.0)
        elif engine.known:
            kv = min(max(engine.kv_usage, 0.0), 1.0)
            room = (1.0 - damping.kv_cost * kv) / (1.0 + max(engine.waiting, 0) / damping.queue_half)
            if engine.ttft_s > 0 and quickest_s > 0:
                room *= max(damping.latency_floor, quickest_s / engine.ttft_s)
            rooms.append(room)
    return sum(rooms) / len(rooms) if rooms else None


def _next(wanted: float, before: Share | None, known: bool, damping: Damping) -> float:
    if wanted <= 0.0:
        return 0.0
    if before is None:
        return damping.floor if known else wanted  # the first look at all of them has nothing to ramp from
    if before.score <= 0.0:
        return damping.floor
    way = wanted - before.score
    if abs(way) < _SETTLED:
        return wanted
    step = max(-damping.most, min(damping.most, damping.alpha * way))
    return before.score + step
