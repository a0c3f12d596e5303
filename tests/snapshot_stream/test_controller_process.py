"""`arks controller --policy-stream` and `arks extproc --policy-stream`: the two commands that a pod runs, together."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from controller.permissions import NAMESPACE
from tests.harness.gateway import running_engine
from tests.harness.kubernetes import KubeApi
from tests.harness.rights import grant
from tests.snapshot_stream.conftest import Tenant
from tests.snapshot_stream.data_plane import ADMITTED, asking, extproc
from tests.snapshot_stream.world import until


def _wait_for(socket: Path) -> None:
    deadline = time.monotonic() + 60
    while not socket.exists():
        assert time.monotonic() < deadline, f"there is no {socket}"
        time.sleep(0.05)


@contextlib.contextmanager
def controller(api: KubeApi, folder: Path, namespace: str, user: str = "admin") -> Iterator[str]:
    """`arks controller`; yields the address of its policy stream, once it is there."""
    address = f"unix:{folder / 'policy.sock'}"
    command = [
        *(sys.executable, "-m", "arks", "controller", "--kubeconfig", str(api.kubeconfig(user))),
        *("--namespace", namespace, "--admin", "127.0.0.1:0", "--policy-stream", address),
    ]
    with (folder / "controller.log").open("ab") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        _wait_for(folder / "policy.sock")
        yield address
    finally:
        process.terminate()
        assert process.wait(60) == 0, (folder / "controller.log").read_text()[-2000:]


async def test_a_token_applied_in_the_cluster_is_admitted_by_the_pods_two_commands(
    api: KubeApi, tenant: Tenant, tmp_path: Path
):
    tenant.endpoint()
    tenant.token("alice", "sk-of-two-commands")
    with controller(api, tmp_path, tenant.namespace) as address, extproc(tmp_path, address):
        async with asking(tmp_path) as decide:
            await decide.until("sk-of-two-commands", ADMITTED)
            await asyncio.to_thread(tenant.delete, "ArksToken", "alice")
            await decide.until("sk-of-two-commands", 401)


async def test_what_requests_used_is_shown_in_the_quotas_status_and_outlives_both_commands(
    api: KubeApi, tenant: Tenant, tmp_path: Path
):
    """With the rights that the manifests grant, and no more."""
    grant(api)
    limits = [{"type": kind, "value": 10_000} for kind in ("prompt", "response", "total")]
    tenant.apply("arks.ai/v1", "ArksQuota", "pot", spec={"quotas": limits})
    with running_engine() as engine:
        port = int(engine.address.rpartition(":")[2])
        ends = [{"fqdn": {"hostname": "localhost", "port": port}}]
        tenant.apply("gateway.envoyproxy.io/v1alpha1", "Backend", "engine", spec={"endpoints": ends})
        backend = {"group": "gateway.envoyproxy.io", "kind": "Backend", "name": "engine", "weight": 1}
        tenant.endpoint(routeConfigs=[backend])
        tenant.token("alice", "sk-spends", qos=[{"arksEndpoint": {"name": "qwen"}, "quota": {"name": "pot"}}])
        for life in (1, 2):
            with controller(api, tmp_path, NAMESPACE, "controller") as address, extproc(tmp_path, address):
                async with asking(tmp_path) as decide:
                    await decide.until("sk-spends", ADMITTED)
                    if life == 2:
                        assert _used(tenant) == {"prompt": 14, "response": 40, "total": 54}, "a restart took it away"
                    for _ in range(2):
                        assert await decide.whole("sk-spends", "qwen", 7, 20) == ADMITTED
                    wanted = {"prompt": 14 * life, "response": 40 * life, "total": 54 * life}
                    await until(lambda wanted=wanted: _used(tenant) == wanted, 90.0)
    assert "forbidden" not in (tmp_path / "controller.log").read_text().lower()


def _used(tenant: Tenant) -> dict[str, int]:
    quota = tenant.api.get("arks.ai/v1", "ArksQuota", "pot", tenant.namespace)
    entries = quota.get("status", {}).get("quotaStatus") or ()
    assert all(each["lastUpdateTime"] for each in entries)
    return {each["type"]: each["used"] for each in entries}
