"""Every way to say who we are works on a real API server, and goes on working when it is renewed."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from controller.kube import credentials as module
from controller.kube.client import Client
from controller.kube.credentials import Access, Credentials, detect, from_kubeconfig, in_cluster
from controller.kube.errors import CredentialsError, UnauthorizedError
from controller.kube.resource import Resource
from tests.harness.kubernetes import KubeApi
from tests.kube.conftest import Connect, until

REVIEWS = Resource("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", namespaced=False)
REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview", "metadata": {}}


async def who(client: Client) -> str:
    """The name under which the API server knows us."""
    found = await client.create(REVIEWS, REVIEW)
    return str(found["status"]["userInfo"]["username"])


async def known_as(client: Client, name: str) -> None:
    """Wait until a renewal in the background has come through."""
    async with asyncio.timeout(60):
        while await who(client) != name:  # noqa: ASYNC110 - each turn asks the server
            await asyncio.sleep(0.02)


async def test_a_token_in_the_kubeconfig(kube_api: KubeApi, connect: Connect) -> None:
    assert await who(await connect(kube_api.kubeconfig("viewer"))) == "viewer"


async def test_a_client_certificate_by_file_and_inline(kube_api: KubeApi, connect: Connect) -> None:
    files = {"client-certificate": str(kube_api.client_cert), "client-key": str(kube_api.client_key)}
    assert await who(await connect(kube_api.kubeconfig(credentials=files))) == "certificate-admin"


async def test_the_context_that_is_named_counts(kube_api: KubeApi, connect: Connect, tmp_path: Path) -> None:
    import yaml

    config = yaml.safe_load(kube_api.kubeconfig("admin").read_text())
    config["users"].append({"name": "weak", "user": {"token": kube_api.token("u3")}})
    config["contexts"].append({"name": "other", "context": {"cluster": "test", "user": "weak"}})
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    assert await who(await connect(from_kubeconfig(str(path), "other"))) == "u3"
    assert await who(await connect(from_kubeconfig(str(path)))) == "admin"


PLUGIN = """
import json, os, sys
folder = sys.argv[1]
with open(folder + "/runs", "a") as runs:
    runs.write("x")
said = json.load(open(folder + "/says"))
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": said}))
"""


class Plugin:
    """A credential plugin that says what a file says, and counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "plugin.py").write_text(PLUGIN)
        self.says({})

    def says(self, status: dict[str, Any]) -> None:
        (self.folder / "says").write_text(json.dumps(status))

    @property
    def runs(self) -> int:
        runs = self.folder / "runs"
        return len(runs.read_text()) if runs.exists() else 0

    @property
    def user(self) -> dict[str, Any]:
        return {
            "exec": {
                "apiVersion": "client.authentication.k8s.io/v1",
                "command": sys.executable,
                "args": [str(self.folder / "plugin.py"), str(self.folder)],
                "interactiveMode": "Never",
            }
        }


def in_s(seconds: float) -> str:
    return (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_a_plugin_runs_once_and_again_only_when_its_token_is_refused(
    kube_api: KubeApi, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_PAUSE_S", 0.0)
    plugin = Plugin(tmp_path)
    plugin.says({"token": kube_api.token("u4"), "expirationTimestamp": in_s(3600)})
    client = await connect(kube_api.kubeconfig(credentials=plugin.user))
    assert [await who(client) for _ in range(3)] == ["u4"] * 3
    assert plugin.runs == 1
    plugin.says({"token": "outdated", "expirationTimestamp": in_s(3600)})
    other = await connect(kube_api.kubeconfig(credentials=plugin.user))
    with pytest.raises(UnauthorizedError):
        await who(other)
    plugin.says({"token": kube_api.token("u5"), "expirationTimestamp": in_s(3600)})
    assert await who(other) == "u5"


async def test_a_plugins_token_is_renewed_before_it_expires(
    kube_api: KubeApi, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_PAUSE_S", 0.2)
    plugin = Plugin(tmp_path)
    plugin.says({"token": kube_api.token("u4"), "expirationTimestamp": in_s(module.EXPIRY_MARGIN_S)})
    client = await connect(kube_api.kubeconfig(credentials=plugin.user))
    assert await who(client) == "u4"
    plugin.says({"token": kube_api.token("u5"), "expirationTimestamp": in_s(3600)})
    await asyncio.sleep(0.3)
    await who(client)  # starts the renewal and does not wait for it
    await until(lambda: plugin.runs >= 2)
    await known_as(client, "u5")
    assert not client.stats.calls["create", "authentication.k8s.io", "selfsubjectreviews", "401"]


@pytest.mark.parametrize("says", [{}, {"token": ""}])
async def test_a_plugin_that_gives_nothing_is_an_error_not_an_anonymous_client(
    kube_api: KubeApi, connect: Connect, tmp_path: Path, says: dict[str, str]
) -> None:
    plugin = Plugin(tmp_path)
    plugin.says(says)
    if not says:
        (tmp_path / "plugin.py").write_text("raise SystemExit(3)")
    client = await connect(kube_api.kubeconfig(credentials=plugin.user))
    with pytest.raises(CredentialsError):
        await who(client)


@pytest.fixture
def pod(kube_api: KubeApi, kube_namespace: str, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A pod's service account folder and variables."""
    for name in ("first", "second"):
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
        kube_api.apply(account, namespace=kube_namespace)
    (tmp_path / "token").write_text(kube_api.service_account_token(kube_namespace, "first") + "\n")
    shutil.copy(kube_api.ca_file, tmp_path / "ca.crt")
    return tmp_path, {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(kube_api.port)}


async def test_a_pods_token_that_the_kubelet_replaces_is_used(
    pod: tuple[Path, dict[str, str]], kube_api: KubeApi, kube_namespace: str, connect: Connect
) -> None:
    folder, environ = pod
    credentials = in_cluster(folder, environ)
    client = await connect(credentials)
    assert await who(client) == f"system:serviceaccount:{kube_namespace}:first"
    (folder / "token").write_text(kube_api.service_account_token(kube_namespace, "second"))
    assert await who(client) == f"system:serviceaccount:{kube_namespace}:first"  # a minute has not passed
    access = await credentials.access()
    credentials._loaded_at = time.monotonic() - 61
    await who(client)
    await known_as(client, f"system:serviceaccount:{kube_namespace}:second")
    assert (await credentials.access()).tls is access.tls  # connections live on


async def test_a_pods_token_that_is_refused_is_read_again_within_the_same_call(
    pod: tuple[Path, dict[str, str]], kube_namespace: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_PAUSE_S", 0.0)
    folder, environ = pod
    good = (folder / "token").read_text()
    (folder / "token").write_text("expired")
    credentials = in_cluster(folder, environ)
    await credentials.access()
    (folder / "token").write_text(good)
    client = await connect(credentials)
    assert await who(client) == f"system:serviceaccount:{kube_namespace}:first"
    assert client.stats.calls["create", "authentication.k8s.io", "selfsubjectreviews", "401"] == 1


async def test_a_token_file_that_is_away_for_a_moment_does_not_stop_us(
    pod: tuple[Path, dict[str, str]], connect: Connect
) -> None:
    folder, environ = pod
    credentials = in_cluster(folder, environ)
    client = await connect(credentials)
    name = await who(client)
    (folder / "token").rename(folder / "away")
    credentials._loaded_at = time.monotonic() - 61
    assert await who(client) == name
    await until(lambda: credentials._loading is None or credentials._loading.done())
    assert await who(client) == name


async def test_a_rotated_ca_is_trusted_and_another_one_is_not(
    pod: tuple[Path, dict[str, str]], connect: Connect, tmp_path: Path
) -> None:
    from controller.kube.errors import UnreachableError

    folder, environ = pod
    shutil.copy(__import__("certifi").where(), folder / "ca.crt")
    client = await connect(in_cluster(folder, environ))
    with pytest.raises(UnreachableError, match="ertificate"):
        await who(client)


@pytest.mark.parametrize("environ", [{}, {"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "1"}])
async def test_outside_a_cluster_it_says_so(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="not inside a cluster"):
        await in_cluster(tmp_path, environ).access()


@pytest.mark.parametrize("text", ["", "{}", "nonsense", "current-context: x", "a: [", None])
async def test_a_broken_kubeconfig_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CredentialsError):
        await from_kubeconfig(str(path)).access()


async def test_a_caller_that_gives_up_does_not_take_the_answer_from_the_others() -> None:
    loads, answer = 0, threading.Event()

    def slow(forced: bool) -> Access:
        nonlocal loads
        loads += 1
        answer.wait()
        return Access("https://x", {})

    credentials = Credentials(slow)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await credentials.access()
    asyncio.get_running_loop().call_later(0.05, answer.set)
    found = await asyncio.gather(*(credentials.access() for _ in range(5)))
    assert loads == 1
    assert len(set(map(id, found))) == 1
    await credentials.close()


def test_secrets_are_not_in_a_repr() -> None:
    assert "sk-1" not in repr(Access("https://x", {"Authorization": "Bearer sk-1"}))


async def test_a_named_kubeconfig_goes_before_the_pods_account(
    kube_api: KubeApi, connect: Connect, monkeypatch: pytest.MonkeyPatch, pod: tuple[Path, dict[str, str]]
) -> None:
    folder, environ = pod
    monkeypatch.setattr(module, "SERVICE_ACCOUNT", folder)
    for name, value in environ.items():
        monkeypatch.setitem(os.environ, name, value)
    assert await who(await connect(detect(str(kube_api.kubeconfig("u6"))))) == "u6"
