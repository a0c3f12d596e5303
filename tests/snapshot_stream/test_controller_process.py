"""`arks controller --policy-stream` and `arks extproc --policy-stream`: the two commands that a pod runs, together."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from tests.harness.gateway import on_this_machine
from tests.harness.kubernetes import KubeApi
from tests.snapshot_stream.conftest import Tenant
from tests.snapshot_stream.data_plane import ADMITTED, asking, extproc


def _wait_for(socket: Path) -> None:
    deadline = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


async def test_a_token_applied_in_the_cluster_is_admitted_by_the_pods_two_commands(
    api: KubeApi, tenant: Tenant, tmp_path: Path
):
    tenant.endpoint()
    tenant.token("alice", "sk-of-two-commands")
    address = f"unix:{tmp_path / 'policy.sock'}"
    command = [
        *(sys.executable, "-m", "arks", "controller", "--kubeconfig", str(api.kubeconfig("admin"))),
        *("--namespace", tenant.namespace, "--admin", "127.0.0.1:0", "--policy-stream", address),
    ]
    with (tmp_path / "controller.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)  # noqa: ASYNC220 - starting takes a moment
    try:
        await asyncio.to_thread(_wait_for, tmp_path / "policy.sock")
        with extproc(tmp_path, address):
            async with asking(tmp_path) as decide:
                await decide.until("sk-of-two-commands", ADMITTED, on_this_machine(20.0))
                await asyncio.to_thread(tenant.delete, "ArksToken", "alice")
                await decide.until("sk-of-two-commands", 401, on_this_machine(1.0))
    finally:
        process.terminate()
        assert process.wait(20) == 0, (tmp_path / "controller.log").read_text()[-2000:]
