"""One step of a rolling update over groups that are objects of their own.

Where every replica is its own object (RoleBasedGroups, so that gang scheduling is per replica), nobody else
rolls them one by one: RoleBasedGroupSet changes all its children at once. :func:`step` decides from what is
observed now; it keeps no memory, so a restarted controller goes on where the last one stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from controller.workloads.model import Surge


class Group(NamedTuple):
    """An existing group: is it of the wanted template, and does it serve?"""

    updated: bool
    ready: bool


class Step(NamedTuple):
    apply: frozenset[int]
    delete: frozenset[int]
    rolling: bool


def step(replicas: int, groups: Mapping[int, Group], surge: Surge) -> Step:
    """Indices to create or bring up to date now, and indices to delete now.

    Groups that do not serve are changed at once, for nothing is lost. A group that serves is changed only while
    enough others do, spares included; a spare, or a group beyond ``replicas``, goes only when it is not needed.
    With the default surges no step ever changes or deletes the last group that serves.
    """
    unavailable, spare_count = surge.counted(replicas)
    wanted = range(replicas)
    old = [i for i in wanted if i in groups and not groups[i].updated and i >= surge.partition]
    idle = {i for i in old if not groups[i].ready}
    busy = sorted((i for i in old if groups[i].ready), reverse=True)
    apply = {i for i in wanted if i not in groups or groups[i].updated} | idle
    spares = set(range(replicas, replicas + spare_count)) if busy else set()
    apply |= spares
    extra = {i for i in groups if i >= replicas}
    serving = sum(group.ready for i, group in groups.items() if i < replicas)
    helping = sum(groups[i].ready and groups[i].updated for i in spares & extra)
    apply |= set(busy[: max(0, serving + helping - (replicas - unavailable))])
    delete = {i for i in extra - spares if not groups[i].ready}
    needed = max(1, replicas - unavailable) if replicas else 0
    left = sum(group.ready for group in groups.values())
    for index in sorted(extra - spares - delete, reverse=True):
        if left <= needed:
            break
        delete.add(index)
        left -= 1
    return Step(frozenset(apply), frozenset(delete), bool(old) or bool(extra))
