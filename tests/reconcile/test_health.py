"""When the process should be started anew, from what its parts tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from controller.health import DEAF_S, STUCK_S, problems


def parts(
    *, heard_s: float = 0.0, running_s: float = 0.0, ending_s: float = 0.0, leads: bool = True
) -> SimpleNamespace:
    queue = SimpleNamespace(longest_running_s=lambda: running_s)
    return SimpleNamespace(
        watches=SimpleNamespace(reflectors={"Pod": SimpleNamespace(age_s=heard_s)}),
        lease=SimpleNamespace(ending_s=ending_s),
        reconciler=SimpleNamespace(queue=queue) if leads else None,
    )


@pytest.mark.parametrize("leads", [True, False])
def test_all_is_well(leads):
    assert problems(parts(leads=leads)) == []


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"heard_s": DEAF_S + 1}, "Pod has not been heard for 181 s"),
        ({"running_s": STUCK_S + 1}, "a pass is stuck"),
        ({"ending_s": STUCK_S + 1}, "the lease is lost, and what led does not end"),
    ],
)
def test_each_trouble_is_a_reason(trouble, said):
    assert problems(parts(**trouble)) == [said]
    assert problems(parts(**{name: value - 2 for name, value in trouble.items()})) == []
