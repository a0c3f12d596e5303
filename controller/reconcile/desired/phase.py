"""Phases and conditions of the application kinds: Arks' names, told from what serves and not from what was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from controller.engines.model import Problem
from controller.reconcile.desired.outcome import Desired
from controller.workloads.model import Counts

_MODEL_REASONS = {"ModelNotExist", "ModelLoadFailed", "ModelLoading"}


class Verdict(NamedTuple):
    type: str
    status: str
    reason: str
    message: str


class Judgement(NamedTuple):
    """The phase, and conditions in Arks' order: Precheck, Loaded, Ready, then warnings that block nothing."""

    phase: str
    conditions: tuple[Verdict, ...]


def judge(desired: Desired, counts: Mapping[str, Counts], wanted: Mapping[str, int], *, stuck: str = "") -> Judgement:
    """``wanted`` are the replicas asked for, by role. Failed is a state, not a verdict: the next pass may differ.
    ``stuck``: what holds a pod up.

    An application that serves goes on being Running while a new, blocked spec waits: what runs is untouched.
    """
    problem = desired.blocked
    precheck = Verdict("Precheck", "True", "PrecheckPass", "The application passed the pre-checking")
    loaded = Verdict("Loaded", "True", "ModelLoadSucceeded", "The referenced model is loaded")
    if problem is not None and problem.reason not in _MODEL_REASONS:
        precheck = Verdict("Precheck", "False", problem.reason, str(problem))
        loaded = Verdict("Loaded", "Unknown", "PrecheckFailed", "not looked at before the pre-checking passes")
    elif problem is not None:
        loaded = Verdict("Loaded", "False", problem.reason, problem.message)
    ready = _ready(problem, counts, wanted, stuck)
    warnings = _warnings(desired.problems)
    return Judgement(_phase(problem, ready), (precheck, loaded, ready, *warnings))


def _ready(problem: Problem | None, counts: Mapping[str, Counts], wanted: Mapping[str, int], stuck: str) -> Verdict:
    """A pipeline that lacks one of its roles serves nothing, whatever the others do."""
    asked = {role: number for role, number in wanted.items() if number}
    absent = [role for role, number in wanted.items() if not number]
    text = ", ".join(f"{role} {counts.get(role, Counts()).ready}/{number}" for role, number in asked.items())
    serves = bool(asked) and not absent and all(counts.get(role, Counts()).ready > 0 for role in asked)
    if serves:
        waiting = f"; the newest spec waits: {problem}" if problem is not None else f"; {stuck}" if stuck else ""
        return Verdict("Ready", "True", "Running", f"The LLM service is running: {text} replicas ready{waiting}")
    if problem is not None:
        return Verdict("Ready", "False", problem.reason, str(problem))
    if absent or not asked:
        of = f" of {' and '.join(absent)}" if asked else ""
        return Verdict("Ready", "False", "ScaledToZero", f"no replicas{of} are asked for")
    return Verdict(
        "Ready", "False", "ReplicasNotReady", f"waiting for replicas: {text} ready{f'; {stuck}' if stuck else ''}"
    )


def _phase(problem: Problem | None, ready: Verdict) -> str:
    if ready.status == "True" or ready.reason == "ScaledToZero":
        return "Running"
    if problem is None:
        return "Creating"
    return "Loading" if problem.reason == "ModelLoading" else "Failed"


def _warnings(problems: tuple[Problem, ...]) -> tuple[Verdict, ...]:
    notes = [problem for problem in problems if not problem.blocking]
    if not notes:
        return ()
    return (Verdict("Degraded", "True", notes[0].reason, "; ".join(map(str, notes))),)
