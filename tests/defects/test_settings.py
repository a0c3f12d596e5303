"""Settings of Arks that were read and did nothing, such as its Sentinel's name: said, or refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness.gateway import environment

SENTINEL = {"--redis.master-name": "mymaster", "--redis.addrs": "a:26379,b:26379", "--redis-url": "redis://a"}


def extproc(*flags: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "arks", "extproc", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment(), **variables})


@pytest.mark.parametrize("flag", SENTINEL)
def test_defect_19_a_flag_that_would_do_nothing_is_refused(flag, tmp_path):
    with extproc("--policy", str(tmp_path), flag, SENTINEL[flag]) as process:
        _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"unrecognized arguments: {flag}" in told


def test_defect_19_a_variable_that_does_nothing_is_said_to(tmp_path):
    """Not refused: Kubernetes puts variables of its own, one for each Service, among ours."""
    state = tmp_path / "state"
    policy = tmp_path / "policy"
    policy.mkdir()
    variables = {"ARKS_REDIS_MASTER_NAME": "mymaster", "ARKS_EXTPROC_SERVICE_HOST": "10.0.0.1"}
    with extproc("--policy", str(policy), "--state", str(state), "--log-format", "json", **variables) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if '"serving"' in line:
                break
        process.terminate()
        process.wait(30)
    told = [line for line in seen if "no such setting, it does nothing" in line]
    assert any("ARKS_REDIS_MASTER_NAME" in line for line in told), seen
    assert not any("ARKS_EXTPROC_SERVICE_HOST" in line for line in told)
