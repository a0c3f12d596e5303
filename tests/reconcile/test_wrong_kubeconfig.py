"""A kubeconfig that leads nowhere ends the start with one sentence: waiting would not heal it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CLUSTER = "clusters: [{name: a, cluster: {server: 'https://127.0.0.1:1'}}]\n"
CONTEXT = "contexts: [{name: a, context: {cluster: a, user: a}}]\ncurrent-context: a\n"
USER = "users: [{name: a, user: {token: sk-secret}}]\n"


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        (f"{{ {USER}", (), "config is not YAML, line"),
        (CLUSTER + CONTEXT + USER, ("--context", "other"), "other"),
        ("", (), "config file is empty"),
    ],
    ids=["not YAML", "no such context", "empty"],
)
def test_a_start_without_usable_credentials_ends_and_says_why(tmp_path, text, more, told):
    file = tmp_path / "config"
    file.write_text(text)
    command = [sys.executable, "-m", "arks", "controller", "--admin", "127.0.0.1:0", "--kubeconfig", str(file), *more]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ARKS_")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert ended.returncode not in {0, None}
    assert told in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert "sk-secret" not in ended.stdout + ended.stderr
