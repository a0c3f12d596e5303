"""A rollout over groups of their own: it ends, and it never takes away the last one that serves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.workloads.model import Surge, default_surge
from controller.workloads.rollout import Group, step

NEW, OLD = True, False


class Cluster:
    """Groups as Kubernetes would hold them: applying an outdated one takes it down, a new one starts unready."""

    def __init__(self, groups):
        self.groups = dict(groups)

    def do(self, replicas, surge):
        found = step(replicas, self.groups, surge)
        for index in found.apply:
            group = self.groups.get(index)
            if group is None or not group.updated:
                self.groups[index] = Group(NEW, ready=False)
        for index in found.delete:
            del self.groups[index]
        return found

    @property
    def ready(self):
        return sum(group.ready for group in self.groups.values())

    def heal(self, index):
        self.groups[index] = self.groups[index]._replace(ready=True)


STATES = st.dictionaries(st.integers(0, 5), st.builds(Group, st.booleans(), st.booleans()), max_size=6)


@given(STATES, st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_last_serving_group_is_never_taken_away_and_the_rollout_ends(groups, replicas, random):
    cluster = Cluster(groups)
    surge = default_surge(replicas)
    for _ in range(60):
        before = cluster.ready
        cluster.do(replicas, surge)
        if replicas and before:
            assert cluster.ready >= 1
        sleeping = [index for index, group in cluster.groups.items() if not group.ready]
        if sleeping:
            cluster.heal(random.choice(sleeping))
    assert set(cluster.groups) == set(range(replicas))
    assert all(group == Group(NEW, ready=True) for group in cluster.groups.values())
    assert not cluster.do(replicas, surge).rolling


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_several_groups_go_one_by_one(replicas):
    cluster = Cluster({index: Group(OLD, ready=True) for index in range(replicas)})
    for done in range(replicas):
        cluster.do(replicas, default_surge(replicas))
        assert cluster.ready == replicas - 1
        cluster.do(replicas, default_surge(replicas))
        assert cluster.ready == replicas - 1, "the next one must wait"
        cluster.heal(replicas - 1 - done)


def test_a_single_group_is_replaced_behind_a_successor_that_serves():
    cluster = Cluster({0: Group(OLD, ready=True)})
    found = cluster.do(1, default_surge(1))
    assert found.apply == {1}
    cluster.do(1, default_surge(1))
    assert cluster.groups[0] == Group(OLD, ready=True), "no successor serves yet"
    cluster.heal(1)
    cluster.do(1, default_surge(1))
    assert cluster.groups == {0: Group(NEW, ready=False), 1: Group(NEW, ready=True)}
    cluster.heal(0)
    cluster.do(1, default_surge(1))
    assert cluster.groups == {0: Group(NEW, ready=True)}


def test_groups_that_do_not_serve_are_changed_at_once():
    groups = {0: Group(OLD, ready=True), 1: Group(OLD, ready=False), 2: Group(OLD, ready=False)}
    assert step(3, groups, default_surge(3)).apply == {1, 2}


def test_scaling_to_zero_deletes_everything():
    assert step(0, {0: Group(NEW, ready=True)}, default_surge(0)).delete == {0}


def test_groups_below_the_partition_stay_as_they_are():
    groups = {index: Group(OLD, ready=True) for index in range(3)}
    assert step(3, groups, Surge(3, 0, partition=2)).apply == {2}


def test_percentages_are_rounded_as_kubernetes_rounds_them():
    assert Surge("25%", "25%").counted(3) == (0, 1)
    assert Surge("10%", 0).counted(3) == (1, 0)
