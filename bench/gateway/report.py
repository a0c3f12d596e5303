"""docs/performance.md and its plot, from one run's rows. Ratios are to the bare Envoy's row of the same run."""

from pathlib import Path

import matplotlib as mpl

from bench.gateway.rig import Row
from bench.page import Figure, figures_table, table, write_section

mpl.use("agg")
from matplotlib import pyplot as plt

PLOT = "performance.png"


def figures(rows: dict[str, Row], scale: dict[str, float]) -> list[Figure]:
    """The figures that the product is held to."""
    bare, aio = rows["bare 1 KB"], rows["grpc_aio 1 KB"]
    found = []
    for name, label in (("compiled", "compiled (`make compiled`)"), ("h2", "pure Python")):
        if f"{name} 1 KB" not in rows:
            continue
        ours = rows[f"{name} 1 KB"]
        request = ours.extproc_us / bare.envoy_us
        chunk = rows[f"{name} chunks"].extproc_us / rows["bare chunks"].envoy_us
        speed = ours.per_second / bare.per_second
        added_ms = (rows[f"{name} 2000/s"].p50_us - rows["bare 2000/s"].p50_us) / 1000
        medium = rows[f"{name} 16 KB"].extproc_us / ours.extproc_us
        large = rows[f"{name} 200 KB"].extproc_us / ours.extproc_us
        found += [
            Figure(
                f"extproc CPU per 1 KB request, complete path, {label}",
                "≤ 0.9 × bare Envoy's, aim 0.6",
                f"{request:.2f} ×",
                request <= 0.9,
            ),
            Figure(
                f"extproc CPU per streamed chunk, {label}",
                "≤ 0.35 × bare Envoy's, aim 0.2",
                f"{chunk:.2f} ×",
                chunk <= 0.35,
            ),
            Figure(
                f"requests per second through one Envoy worker, {label}",
                "≥ 0.45 × bare",
                f"{speed:.2f} ×",
                speed >= 0.45,
            ),
            Figure(
                f"added latency p50 at 2 000 requests/s, {label}", "≤ 0.3 ms", f"{added_ms:.2f} ms", added_ms <= 0.3
            ),
            Figure(f"16 KB body, {label}", "≤ 2 × the 1 KB figure", f"{medium:.2f} ×", medium <= 2),
            Figure(f"200 KB body, {label}", "≤ 12 × the 1 KB figure", f"{large:.2f} ×", large <= 12),
        ]
    found.append(
        Figure("extproc CPU per 1 KB request, grpc_aio", "the ratio", f"{aio.extproc_us / bare.envoy_us:.2f} ×", None)
    )
    if scale:
        memory, pause = scale["streams_mb"], scale["pause_ms"]
        found += [
            Figure(
                "memory at 10 000 tokens, 1 000 endpoints, 5 000 open streams",
                "≤ 250 MB",
                f"{memory:.0f} MB",
                memory <= 250,
            ),
            Figure(
                "longest pause of the loop while one of 10 000 tokens changes",
                "≤ 20 ms",
                f"{pause:.1f} ms",
                pause <= 20,
            ),
        ]
    return found


def write(folder: Path, rows: dict[str, Row], scale: dict[str, float], machine: str) -> None:
    """Replace the measured part of performance.md and draw the plot; prints the table too."""
    detail = []
    for name, row in rows.items():
        latency = (row.chunk_p50_us, row.chunk_p99_us) if row.chunks else (row.p50_us, row.p99_us)
        cpu = (f"{row.per_second:.0f}", f"{row.envoy_us:.2f}", f"{row.extproc_us:.2f}")
        detail.append((name, *cpu, f"{latency[0]:.0f}", f"{latency[1]:.0f}"))
    head = ("row", "per second", "Envoy CPU µs", "extproc CPU µs", "p50 µs", "p99 µs")
    judged = figures_table(figures(rows, scale))
    lines = [f"Machine: 2 shared cores, {machine}.", "", *judged, "", f"![]({PLOT})", "", *table(head, detail)]
    write_section(folder, "measured", lines)
    _plot(folder / PLOT, rows)


def _plot(path: Path, rows: dict[str, Row]) -> None:
    groups = [
        ("per 1 KB request", ["bare 1 KB", "compiled 1 KB", "h2 1 KB", "grpc_aio 1 KB"]),
        ("per streamed chunk", ["bare chunks", "compiled chunks", "h2 chunks", "grpc_aio chunks"]),
    ]
    figure, axes = plt.subplots(1, len(groups), figsize=(9, 3.6))
    for axis, (title, wanted) in zip(axes, groups, strict=True):
        names = [name for name in wanted if name in rows]
        envoy = [rows[name].envoy_us for name in names]
        ours = [rows[name].extproc_us for name in names]
        labels = [name.split(" ", maxsplit=1)[0] for name in names]
        axis.bar(labels, envoy, color="#9db4c0", label="Envoy")
        bars = axis.bar(labels, ours, bottom=envoy, color="#c2185b", label="extproc")
        axis.bar_label(
            bars, [f"{value:.1f}" if value else "" for value in ours], label_type="center", color="white", fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("CPU µs")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
