"""`python -m bench.controller` at a size that says nothing of speed: it goes through, and writes what it found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.go_build import NoGoError
from tests.harness.kubernetes import binaries

SMALL = {"tokens": 20, "endpoints": 4, "pods": 8, "tenants": 2, "changes": 2, "burst": 3, "rounds": 1, "seconds": 1}
GATEWAYS = "# Performance\n\n<!-- measured: begin -->\nthe gateway's\n<!-- measured: end -->\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_run_writes_every_figure_and_only_its_own_part_of_the_page(tmp_path: Path):
    try:
        binaries()
    except NoGoError as error:
        pytest.skip(f"the Kubernetes API server cannot be built: {error}")
    (tmp_path / "performance.md").write_text(GATEWAYS)
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "bench.controller", *flags, "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith(GATEWAYS)
    part = text.removeprefix(GATEWAYS)
    judged = re.findall(r"^\| ([^|]+) \| (<|0)[^|]* \| [0-9][^|]* \| (ok|\*\*missed\*\*) \|$", part, re.MULTILINE)
    assert len(judged) == 8, part
    for what in ("creation", "revocation", "process start", "CPU", "RSS", "API writes"):
        assert any(what in name for name, _, _ in judged), what
    assert f"{SMALL['tokens']} patch arkstokens/status" in part
    assert "nan" not in part
    assert "None" not in part
