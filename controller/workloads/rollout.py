"""One step of a rolling update over groups that are objects of their own.

Where every replica is its own object (RoleBasedGroups, so that gang scheduling is per replica), nobody else
rolls them one by one: RoleBasedGroupSet changes all its children at once. :func:`step` decides from what is
observed now; it keeps no memory, so a restarted controller goes on where the last one stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Group(NamedTuple):
    """An existing group: is it of the wanted template, and does it serve?"""

    updated: bool
    ready: bool


class Step(NamedTuple):
    apply: frozenset[int]
    delete: frozenset[int]
    rolling: bool


def step(replicas: int, groups: Mapping[int, Group]) -> Step:
    """Indices to create or bring up to date now, and indices to delete now.

    Invariant: with at least one group wanted, no step deletes or changes the last ready group. Groups that do
    not serve are changed at once, for nothing is lost. One replica surges to index ``replicas`` first.
    """
    wanted = range(replicas)
    apply = {index for index in wanted if index not in groups}
    apply |= {index for index in wanted if index in groups and groups[index].updated}
    outdated = [index for index in wanted if index in groups and not groups[index].updated]
    idle = [index for index in outdated if not groups[index].ready]
    busy = sorted((index for index in outdated if groups[index].ready), reverse=True)
    ready = sum(1 for index in wanted if index in groups and groups[index].ready)
    apply |= set(idle)
    extra = {index for index in groups if index >= replicas}
    delete = set(extra)
    if replicas == 1:
        spare = groups.get(1)
        if busy:
            # The successor is created beside the old group and must serve before the old one may go.
            apply.add(1)
            delete.discard(1)
            if spare is not None and spare.ready and spare.updated:
                apply.add(0)
        elif spare is not None and ready == 0:
            # The only group that serves, or is about to: keep it until index 0 is back.
            delete.discard(1)
            if not spare.ready:
                delete.add(1)
    else:
        # Exactly one may be missing at a time, and it may be missing only if all others serve.
        allowed = ready - (replicas - 1)
        apply |= set(busy[: max(0, allowed)])
        if ready == 0 and replicas > 0:
            # Scaling down from groups that serve to groups that do not yet: let the old ones serve on.
            delete -= {index for index in extra if groups[index].ready}
    return Step(frozenset(apply), frozenset(delete), bool(outdated) or bool(extra))
