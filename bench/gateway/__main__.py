"""`make bench-gateway`: what a request and a streamed chunk cost, against the same Envoy without ext_proc.

Machines differ by a factor of two and neighbours make noise, so every figure is measured in rounds that alternate with
the bare Envoy's, the median of the rounds counts, and the ratio to the bare row is what decides.
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bench.gateway import policies, report
from bench.gateway.rig import Row, Target, backend, bare, build_load, gateway, measure
from bench.process import peak_mb

STREAMS, CHUNKS, CHUNK_RATE = 100, 500, 200.0
TOKENS, ENDPOINTS, OPEN_STREAMS = 10_000, 1_000, 5_000


def chat(size: int, *, stream: bool = False) -> bytes:
    """A chat request whose body has `size` bytes."""
    request = {"model": "qwen-7b", "stream": stream, "messages": [{"role": "user", "content": ""}], "max_tokens": 64}
    request["messages"][0]["content"] = "x" * (size - len(json.dumps(request, separators=(",", ":"))))  # type: ignore[index]
    return json.dumps(request, separators=(",", ":")).encode()


def median(rows: list[Row]) -> Row:
    """Field by field: one noisy neighbour must not decide."""
    return Row(**{name: statistics.median(getattr(row, name) for row in rows) for name in Row.__slots__})


def alternate(rounds: int, runs: dict[str, Callable[[], Row]]) -> dict[str, Row]:
    rows: dict[str, list[Row]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            rows[name].append(run())
            row = rows[name][-1]
            print(
                f"{number + 1}/{rounds} {name:<24} {row.per_second:>9.0f}/s  Envoy {row.envoy_us:6.2f} us"
                f"  extproc {row.extproc_us:6.2f} us  p50 {row.p50_us} p99 {row.p99_us}"
                + (f"  refused {row.refused} failed {row.failed}" if row.refused or row.failed else ""),
                flush=True,
            )
    return {name: median(several) for name, several in rows.items()}


def metric(admin: str, name: str) -> float:
    with urllib.request.urlopen(f"{admin}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
    raise SystemExit(f"no metric {name}")


def requests(load: Path, folder: Path, rounds: int, seconds: float, compiled: Path | None) -> dict[str, Row]:
    """Every row of one token's traffic."""
    policy = folder / "policy"
    policies.write(policy)
    small, large, huge, streamed = chat(1024), chat(16 * 1024), chat(200 * 1024), chat(1024, stream=True)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(backend(load, CHUNKS, CHUNK_RATE))
        h2 = stack.enter_context(gateway(policy, port, "h2", folder / "h2"))
        aio = stack.enter_context(gateway(policy, port, "grpc_aio", folder / "aio"))
        fast = stack.enter_context(gateway(policy, port, "h2", folder / "fast", compiled)) if compiled else None
        plain = stack.enter_context(bare(folder / "h2", folder / "bare"))

        def run(target: Target, body: bytes, **how: float) -> Callable[[], Row]:
            return lambda: measure(load, target, body, **{"seconds": seconds, **how})  # type: ignore[arg-type]

        for target in filter(None, (plain, h2, aio, fast)):  # connections, caches, allocators
            measure(load, target, small, seconds=1.0)
        streams = {"connections": STREAMS, "requests": STREAMS, "seconds": 3 * CHUNKS / CHUNK_RATE}
        targets = {"bare": plain, "h2": h2, "grpc_aio": aio, **({"compiled": fast} if fast is not None else {})}
        lean = {name: target for name, target in targets.items() if name != "grpc_aio"}
        runs: dict[str, Callable[[], Row]] = {}
        runs |= {f"{name} 1 KB": run(target, small) for name, target in targets.items()}
        runs |= {f"{name} 16 KB": run(target, large, connections=32) for name, target in lean.items()}
        runs |= {f"{name} 200 KB": run(target, huge, connections=32) for name, target in lean.items()}
        runs |= {f"{name} 500/s": run(target, small, rate=500) for name, target in lean.items()}
        runs |= {f"{name} 2000/s": run(target, small, rate=2000) for name, target in lean.items()}
        runs |= {f"{name} chunks": run(target, streamed, **streams) for name, target in targets.items()}
        return alternate(rounds, runs)


def scale(load: Path, folder: Path) -> dict[str, float]:
    """Memory with many tokens, endpoints and open streams, and the longest pause while one token of many changes."""
    policy = folder / "many"
    policies.write(policy, TOKENS, ENDPOINTS)
    with (
        backend(load, 10_000, 0.2) as slow,
        gateway(policy, slow, "h2", folder / "scale") as target,
    ):
        assert target.extproc is not None
        figures = {"idle_mb": peak_mb(target.extproc)}
        metric(target.admin, "arks_event_loop_lag_max_seconds")  # each reading begins a new maximum
        for change in range(1, 4):
            policies.write_tokens(policy, TOKENS, ENDPOINTS, changed=change)
            time.sleep(4)
        figures["pause_ms"] = 1000 * metric(target.admin, "arks_event_loop_lag_max_seconds")
        time.sleep(5)
        figures["quiet_pause_ms"] = 1000 * metric(target.admin, "arks_event_loop_lag_max_seconds")
        measure(load, target, chat(1024, stream=True), connections=OPEN_STREAMS, seconds=15, requests=OPEN_STREAMS)
        figures["streams_mb"] = peak_mb(target.extproc)
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; the median counts (default 3)")
    parser.add_argument("--seconds", type=float, default=2.5, help="length of each run (default 2.5)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where performance.md and its plot go")
    parser.add_argument("--no-scale", action="store_true", help="leave out the rows with 10 000 tokens")
    parser.add_argument(
        "--compiled", type=Path, help="Python of an environment with the compiled product (make compiled)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arks-bench-") as name:
        folder = Path(name)
        load = build_load(folder)
        rows = requests(load, folder, options.rounds, options.seconds, options.compiled)
        figures = {} if options.no_scale else scale(load, folder)
    report.write(options.out, rows, figures, machine=f"{platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
