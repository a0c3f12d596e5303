"""The controller's part of docs/performance.md, from one run."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.controller.measures import Changes, Settling, Start, Steady, percentile
from bench.controller.world import Size
from bench.page import Figure, figures_table, table, write_section

SECTION = "measured controller"


@dataclass(slots=True)
class Run:
    """All that one run found."""

    size: Size
    first: Settling
    """the world as people applied it"""
    second: Settling
    """its pods come up and its routes are answered"""
    steady: Steady
    following: Steady
    """every endpoint's weights follow its engines' load"""
    looks_per_s: float
    """at engines, meanwhile"""
    changes: Changes
    alone: list[Start] = field(default_factory=list)
    together: list[Start] = field(default_factory=list)


def figures(run: Run) -> list[Figure]:
    """The figures that the product is held to."""
    found = []
    for what, values in (("creation", run.changes.created), ("revocation", run.changes.revoked)):
        slow_ms = 1000 * percentile(values, 0.99)
        text = f"a token's {what} reaches extproc's decision, p99 of {len(values)}"
        found.append(Figure(text, "< 1 s, aim 100 ms", f"{slow_ms:.0f} ms", slow_ms < 1000))
    for what, starts in (("controller", run.alone), ("controller and extproc together", run.together)):
        slowest = max(each.serving for each in starts)
        text = f"{what}: process start to deciding by the whole policy, slowest of {len(starts)}"
        found.append(Figure(text, "< 20 s, aim 5", f"{slowest:.1f} s", slowest < 20))
    stretches = (run.steady, run.following)
    for what, each in (("", run.steady), (f", {run.looks_per_s:.0f} looks at engines a second", run.following)):
        share = 100 * each.controller_cpu
        found.append(Figure(f"controller CPU in steady state{what}", "< 5 % of a core", f"{share:.1f} %", share < 5))
    resident = max(each.controller_mb for each in stretches)
    found.append(Figure("controller RSS, all loaded", "< 200 MB", f"{resident:.0f} MB", resident < 200))
    writes, leases = (sum(counts) for counts in zip(*((s.writes.total(), s.renewals) for s in stretches), strict=True))
    text = f"API writes in {sum(s.seconds for s in stretches):.0f} s of steady state, beside {leases} of the Lease"
    found.append(Figure(text, "0", str(writes), writes == 0))
    return found


def write(folder: Path, run: Run, machine: str) -> None:
    """Replace the section in performance.md; prints it, too."""
    crowded = max(run.steady.others_cpu, run.following.others_cpu) > 0.05
    where = f"Machine: {os.cpu_count()} shared cores, {machine}{', with other work on them' if crowded else ''}."
    lines = [f"{where} {run.size}.", "", *figures_table(figures(run)), ""]
    lines += [*_settlings(run), "", *_times(run), "", *_costs(run)]
    write_section(folder, SECTION, lines)


def _settlings(run: Run) -> list[str]:
    rows = []
    for what, each in (
        ("everything applied before the controller's first start", run.first),
        ("all pods come up, all routes are answered", run.second),
    ):
        written = ", ".join(f"{count} {name}" for name, count in each.writes.most_common(8))
        rows.append((what, f"{each.seconds:.1f} s", str(each.writes.total()), f"{each.peak_mb:.0f} MB", written))
    return table(("first settling", "until the last write", "writes", "peak RSS", "most of them"), rows)


def _times(run: Run) -> list[str]:
    changes = run.changes
    rows = []
    for what, values in (("token created → admitted", changes.created), ("token deleted → refused", changes.revoked)):
        rows.append((what, str(len(values)), *_spread(values)))
    for what, starts in (("start of the controller", run.alone), ("start of both", run.together)):
        rows.append((f"{what} → whole policy told", str(len(starts)), *_spread([each.told for each in starts])))
        rows.append((f"{what} → first decision", str(len(starts)), *_spread([each.serving for each in starts])))
    rows.append((f"last of {changes.burst} tokens created at once → all admitted", "1", *_spread([changes.burst_s])))
    rows.append(("longest pause of extproc's loop, tokens coming and going", "", *_spread([changes.pause_s])))
    return table(("from → to", "times", "p50 ms", "p90 ms", "p99 ms", "longest ms"), rows)


def _spread(values: list[float]) -> Iterable[str]:
    return (f"{1000 * percentile(values, part):.0f}" for part in (0.5, 0.9, 0.99, 1.0))


def _costs(run: Run) -> list[str]:
    rows = []
    for what, each in (("no engine is looked at", run.steady), ("all weights follow load", run.following)):
        cpu = f"{100 * each.controller_cpu:.1f} %", f"{100 * each.extproc_cpu:.1f} %"
        memory = f"{each.controller_mb:.0f} MB", f"{each.extproc_mb:.0f} MB"
        rows.append((what, *cpu, *memory, f"{100 * each.others_cpu:.0f} %"))
    head = ("steady state", "controller CPU", "extproc CPU", "controller RSS", "extproc RSS", "others on the machine")
    return table(head, rows)
