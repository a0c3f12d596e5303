"""What a gateway benchmark runs on: the product as `arks up` starts it, and the same Envoy without ext_proc beside it.

The bare Envoy reads the very bootstrap that `arks up` wrote, less the ext_proc filter and the access log, so that the
two rows differ in nothing else. CPU time is what the kernel's scheduler counted for every thread of a process.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import children, cpu_s

LOAD_SOURCE = Path(__file__).with_name("load.c")
READY_TIMEOUT_S = 60.0


def build_load(folder: Path) -> Path:
    """Compile the two ends. Needs a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit(
            "the benchmark's load generator is C: install a compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)"
        )
    target = folder / "load"
    subprocess.run([compiler, "-O2", "-o", str(target), str(LOAD_SOURCE)], check=True)
    return target


@dataclass(frozen=True, slots=True)
class Target:
    """Something to load: its port, and the processes whose CPU counts."""

    port: int
    envoy: int
    extproc: int | None
    admin: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    ok: int
    refused: int
    failed: int
    seconds: float
    p50_us: int
    p99_us: int
    chunks: int
    chunk_p50_us: int
    chunk_p99_us: int
    envoy_us: float
    """CPU per answered request, or per chunk where the row streams"""
    extproc_us: float

    @property
    def per_second(self) -> float:
        return (self.chunks or self.ok) / self.seconds


@contextlib.contextmanager
def backend(load: Path, chunks: int = 500, rate: float = 200.0) -> Iterator[int]:
    """An engine that answers at once; its port."""
    process = subprocess.Popen([str(load), "backend", "0", str(chunks), str(rate)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["port"]
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway(
    policy: Path, engine_port: int, transport: str, folder: Path, python: Path | None = None
) -> Iterator[Target]:
    """`arks up`, as a user starts it; `python` is that of another environment where the product is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log").open("wb")
    command = [
        *(
            str(python or sys.executable),
            "-m",
            "arks",
            "up",
            "--policy",
            str(policy),
            "--engine",
            f"http://127.0.0.1:{engine_port}",
        ),
        *("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--state", str(folder), "--transport", transport),
        *("--access-log", "off"),
    ]
    # Without the working directory on its path another environment runs its own packages, not this checkout's.
    environment = {**os.environ, **({"PYTHONSAFEPATH": "1"} if python else {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("arks up did not start:\n" + (folder / "log").read_text()[-2000:])
        ready = json.loads(line)
        pids = {
            Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0:4].__str__(): pid for pid in children(process.pid)
        }
        envoy = next(pid for name, pid in pids.items() if "envoy" in name)
        extproc = next(pid for name, pid in pids.items() if "extproc" in name)
        yield Target(int(ready["gateway"].rsplit(":", 1)[1]), envoy, extproc, ready["admin"])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


@contextlib.contextmanager
def bare(gateway_folder: Path, folder: Path) -> Iterator[Target]:
    """Envoy with the same configuration as the gateway's in `gateway_folder`, without ext_proc."""
    folder.mkdir(parents=True, exist_ok=True)
    source = next(gateway_folder.rglob("envoy*.json"))
    config = json.loads(source.read_text())
    listener = config["static_resources"]["listeners"][0]
    listener["address"]["socket_address"]["port_value"] = 0
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [one for one in manager["http_filters"] if "ext_proc" not in one["name"]]
    manager["access_log"] = []
    admin = folder / "admin"
    config["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
    (folder / "envoy.json").write_text(json.dumps(config))
    binary = Path(f"/proc/{os.getpid()}/exe")  # replaced below; keeps the type
    for pid in Path("/proc").iterdir():
        if pid.name.isdigit():
            with contextlib.suppress(OSError):
                if (
                    b"envoy" in (pid / "cmdline").read_bytes()
                    and str(source).encode() in (pid / "cmdline").read_bytes()
                ):
                    binary = (pid / "exe").resolve()
    command = [
        *(str(binary), "-c", str(folder / "envoy.json"), "--concurrency", "1", "--use-dynamic-base-id"),
        *("--admin-address-path", str(admin), "--log-level", "error"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Target(_listener_port(admin), process.pid, None)
    finally:
        process.kill()
        process.wait()


def _listener_port(admin: Path) -> int:
    import urllib.request  # noqa: PLC0415 - only here

    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, KeyError, IndexError, ValueError):
            with urllib.request.urlopen(f"http://{admin.read_text()}/listeners?format=json", timeout=2) as answer:
                listeners: list[dict[str, Any]] = json.load(answer)["listener_statuses"]
            return int(listeners[0]["local_address"]["socket_address"]["port_value"])
        time.sleep(0.05)
    raise SystemExit("the bare Envoy did not start")


def measure(
    load: Path,
    target: Target,
    body: bytes,
    *,
    connections: int = 64,
    seconds: float = 2.5,
    rate: float = 0.0,
    requests: int = 0,
    token: str = "sk-bench",
) -> Row:
    """One run of the client, and what it cost the target's processes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        before = cpu_s(target.envoy), cpu_s(target.extproc) if target.extproc else 0.0
        command = [
            *(str(load), "client", str(target.port), str(connections), str(seconds), str(rate), file.name),
            *(f"authorization: Bearer {token}", str(requests)),
        ]
        out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        # What is settled and written after the last answer belongs to the run.
        time.sleep(0.3)
        after = cpu_s(target.envoy), cpu_s(target.extproc) if target.extproc else 0.0
    units = max(1, out["chunks"] or out["ok"] + out["refused"])
    return Row(
        ok=out["ok"],
        refused=out["refused"],
        failed=out["failed"],
        seconds=out["seconds"],
        p50_us=out["p50_us"],
        p99_us=out["p99_us"],
        chunks=out["chunks"],
        chunk_p50_us=out["chunk_p50_us"],
        chunk_p99_us=out["chunk_p99_us"],
        envoy_us=(after[0] - before[0]) / units * 1e6,
        extproc_us=(after[1] - before[1]) / units * 1e6,
    )
