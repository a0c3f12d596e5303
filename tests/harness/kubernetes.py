"""A real Kubernetes API server for tests: kube-apiserver and etcd on loopback, RBAC on, ready in about four seconds.

Fixtures (in `tests/harness/plugin.py`, loaded for every test by `tests/conftest.py`):

    kube_api        session: one shared `KubeApi`. Leave it running and clean; do not stop, freeze or restart it.
    kube_namespace  function: name of a fresh namespace there; emptied and removed afterwards.
    kube_cluster    session: another shared one with a real kube-controller-manager: Deployments make ReplicaSets make
                    pods, Jobs make pods, owner references are collected, namespaces go, ServiceAccounts appear.
    own_kube_api    function: a `KubeApi` of the test's own, to stop, freeze, restart, compact (3 s, 300 MB: sparingly).

`KubeApi` in short (methods are synchronous and quick; use `await asyncio.to_thread(...)` around start, stop, restart):

    url, ca_file, log_file               https://127.0.0.1:port, the CA as PEM, the server's log
    kubeconfig(user, server=None, ...)   path of a kubeconfig; `server` points it at a TcpProxy
    token(user)                          users: admin (system:masters), controller, viewer, u0 … u9; without any rights
                                         but admin. controller is system:serviceaccount:arks-system:arks-controller
    service_account_token(ns, name)      a real bound token of an existing ServiceAccount
    client_cert, client_key              files of a client certificate that is an administrator
    apply(*documents, namespace=...)     server-side apply of YAML text, paths, folders or dicts as admin; waits until
                                         CRDs are served; returns the applied objects
    delete(...), get(...), list(...)     by (apiVersion, kind, name, namespace), or `request(method, path, body)`
    set_status(object, **status)         merge-patch the status subresource (as a kubelet or another controller would)
    create_namespace(), remove_namespace(name)
    start_controllers(names)             the controller manager, where it was not asked for at the start
    stop(), start(), restart()           etcd keeps its data; `start(token_overrides)` rotates tokens
    freeze(), thaw()                     SIGSTOP and SIGCONT of the API server
    freeze_etcd(), thaw_etcd()           the same of etcd: the API server lives, and answers nothing that needs it
    compact()                            etcd forgets history: a watch from an old resourceVersion gets 410
    flags                                extra API server flags, used by the next start
    audit                                with `KubeApi(audit=True)`: every write that the server saw (`audit.py`)

What is not there: kubelet and scheduler, so no pod gets a node, runs or becomes ready; and without `controllers`, the
controller manager: no Deployment makes pods, no owner reference is collected. Tests act for them (`set_status`).
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import ctypes
import http.client
import json
import queue
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from tests.harness.audit import AuditLog
from tests.harness.go_build import go_binary

KUBERNETES_VERSION = "1.36.3"
ETCD_VERSION = "3.6.8"
CERTS_VERSION = "1"
READY_TIMEOUT_S = 120.0
CONTROLLERS = (
    "deployment-controller",
    "replicaset-controller",
    "job-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "endpointslice-controller",
    "clusterrole-aggregation-controller",
)
PR_SET_PDEATHSIG = 1
CONTROLLER_USER = "system:serviceaccount:arks-system:arks-controller"

Object = dict[str, Any]
Document = str | Path | Mapping[str, Any]


class KubeError(Exception):
    """The API server refused; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


def binaries() -> tuple[Path, Path, Path]:
    """kube-apiserver, etcd and the certificate writer, built if missing (minutes); `NoGoError` without a toolchain."""
    return (
        _kubernetes("kube-apiserver"),
        go_binary("etcd", ETCD_VERSION, "./etcd", module="kubernetes"),
        go_binary("kubecerts", CERTS_VERSION, "./kubecerts", module="kubernetes"),
    )


def controller_manager() -> Path:
    """kube-controller-manager; built on its first use, like the others."""
    return _kubernetes("kube-controller-manager")


def _kubernetes(name: str) -> Path:
    stamp = " ".join(
        f"-X k8s.io/component-base/version.{key}={value}"
        for key, value in (("gitVersion", f"v{KUBERNETES_VERSION}"), ("gitMajor", "1"), ("gitMinor", "36"))
    )
    package = f"k8s.io/kubernetes/cmd/{name}"
    return go_binary(name, KUBERNETES_VERSION, package, module="kubernetes", ldflags=stamp)


class KubeApi:
    """One etcd and one API server with a state folder of their own. `start`, then `close`; also a context manager."""

    def __init__(
        self,
        flags: Iterable[str] = (),
        etcd_flags: Iterable[str] = (),
        controllers: Iterable[str] = (),
        *,
        audit: bool = False,
    ) -> None:
        self.flags, self.etcd_flags, self.controllers = list(flags), list(etcd_flags), list(controllers)
        self.folder = Path(tempfile.mkdtemp(prefix="arks-kube-"))
        self.audit = AuditLog(self.folder)
        if audit:
            self.flags += self.audit.flags()
        self.log_file = self.folder / "apiserver.log"
        self.ca_file = self.folder / "ca.crt"
        self.client_cert, self.client_key = self.folder / "client.crt", self.folder / "client.key"
        self.port = self._etcd_port = 0
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._controllers: subprocess.Popen[bytes] | None = None
        # The kernel ends a child with the thread that started it (see `_spawn`), so one thread of ours starts them all.
        self._starter = concurrent.futures.ThreadPoolExecutor(1)
        self._idle: queue.SimpleQueue[http.client.HTTPSConnection] = queue.SimpleQueue()
        self._kinds: dict[tuple[str, str], tuple[str, bool]] = {}
        self._tls: ssl.SSLContext | None = None
        self._tokens = {user: f"{user}-{secrets.token_hex(8)}" for user in ("admin", "controller", "viewer", *_SPARE)}

    # -- life cycle ---------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, token_overrides: Mapping[str, str] | None = None) -> None:
        """Start what does not run; returns when the server is ready. `token_overrides` gives users other tokens."""
        apiserver, etcd, certs = binaries()
        self._tokens |= token_overrides or {}
        if not self.ca_file.exists():
            subprocess.run([certs, self.folder], check=True, timeout=30)
            self._tls = ssl.create_default_context(cafile=str(self.ca_file))
        self._write_tokens()
        for attempt in range(3):
            if not self.port or attempt:
                # A port is only known to be free when asked; another process may be faster, so try anew.
                self.port, self._etcd_port, self._peer_port = _free_ports(3)
                self._end(self._etcd, signal.SIGKILL)
                self._etcd = None
            if self._etcd is None or self._etcd.poll() is not None:
                self._etcd = self._spawn(self._etcd_command(etcd), "etcd.log")
            self._server = self._spawn(self._server_command(apiserver), self.log_file.name)
            if self._wait_ready():
                if self.controllers:
                    self.start_controllers()
                return
        raise RuntimeError(f"kube-apiserver does not get ready:\n{self.log_file.read_text()[-3000:]}")

    def start_controllers(self, controllers: Iterable[str] | None = None) -> None:
        """Start the controller manager if it does not run. Kinds installed later are collected half a minute later."""
        self.controllers = self.controllers if controllers is None else list(controllers)
        if self._controllers is None:
            self._controllers = self._spawn(self._controllers_command(), "controllers.log")

    def stop(self, *, kill: bool = False) -> None:
        """End the API server (etcd goes on): like a rolling restart with SIGTERM, like a lost node with `kill`."""
        self._end(self._server, signal.SIGKILL if kill else signal.SIGTERM)
        self._server = None

    def restart(self, *, kill: bool = False, token_overrides: Mapping[str, str] | None = None) -> None:
        self.stop(kill=kill)
        self.start(token_overrides)

    def close(self) -> None:
        """End both and remove their state; harmless when done twice."""
        self.thaw_etcd()
        self.thaw()
        self._end(self._controllers, signal.SIGKILL)
        self._end(self._server, signal.SIGKILL)
        self._end(self._etcd, signal.SIGKILL)
        self._server = self._etcd = self._controllers = None
        self._starter.shutdown()
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def freeze(self) -> None:
        """The API server stops answering but keeps its connections."""
        if self._server is not None:
            self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGCONT)

    def freeze_etcd(self) -> None:
        """The API server goes on, but nothing can be read from or written to its storage."""
        if self._etcd is not None:
            self._etcd.send_signal(signal.SIGSTOP)

    def thaw_etcd(self) -> None:
        if self._etcd is not None and self._etcd.poll() is None:
            self._etcd.send_signal(signal.SIGCONT)

    def compact(self) -> None:
        """etcd forgets everything but the present state."""
        head = self._etcd_call("/v3/kv/range", {"key": base64.b64encode(b"k").decode()})["header"]["revision"]
        self._etcd_call("/v3/kv/compaction", {"revision": head, "physical": True})

    def rss_mb(self) -> dict[str, float]:
        """Resident memory of both processes."""
        sizes = {}
        for name, process in (("etcd", self._etcd), ("kube-apiserver", self._server)):
            if process is not None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                sizes[name] = int(status.split("VmRSS:")[1].split()[0]) / 1024
        return sizes

    # -- who asks -----------------------------------------------------------------------------------------------------

    def token(self, user: str = "admin") -> str:
        return self._tokens[user]

    def user_name(self, user: str) -> str:
        """The user's name in Kubernetes: in bindings and in the audit log."""
        return CONTROLLER_USER if user == "controller" else user

    def service_account_token(self, namespace: str, name: str, seconds: int = 3600) -> str:
        """A bound token of an existing ServiceAccount, as a pod would have it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        return str(self.request("POST", path, body)["status"]["token"])

    def kubeconfig(
        self, user: str = "admin", *, server: str | None = None, credentials: Mapping[str, Any] | None = None
    ) -> Path:
        """A kubeconfig file. `server`: another address (a proxy's); `credentials`: the `user` entry, else the token."""
        path = self.folder / f"{user}-{secrets.token_hex(3)}.kubeconfig"
        cluster = {"server": server or self.url, "certificate-authority": str(self.ca_file)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": dict(credentials or {"token": self.token(user)})}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    # -- the API ------------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        user: str = "admin",
        token: str | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """One request as that user; the decoded JSON answer. Raises `KubeError` from 400 on."""
        headers = {"Authorization": f"Bearer {token or self.token(user)}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body)
        for attempt in (0, 1):
            connection = self._connection(fresh=attempt > 0)
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                text = response.read()
                self._idle.put(connection)
                break
            except (http.client.HTTPException, OSError):
                # A kept connection may have died with a restarted server; a second failure is the server's.
                connection.close()
                if attempt:
                    raise
        if response.status >= 400:
            with contextlib.suppress(ValueError):
                text = json.loads(text).get("message", text)
            raise KubeError(response.status, str(text))
        if "json" not in (response.getheader("Content-Type") or ""):
            return text.decode()
        return json.loads(text)

    def apply(self, *documents: Document, namespace: str = "default", user: str = "admin") -> list[Object]:
        """Server-side apply, in order. Text and files may hold many documents, a folder all its *.yaml."""
        applied = []
        for item in _objects(documents):
            path = self.path(item["apiVersion"], item["kind"], item["metadata"].get("namespace", namespace))
            query = "?fieldManager=test&force=true"
            path = f"{path}/{item['metadata']['name']}{query}"
            applied.append(self.request("PATCH", path, item, user=user, content_type="application/apply-patch+yaml"))
            if item["kind"] == "CustomResourceDefinition":
                self._wait_served(applied[-1])
        return applied

    def get(self, api_version: str, kind: str, name: str, namespace: str = "default", *, user: str = "admin") -> Object:
        found: Object = self.request("GET", f"{self.path(api_version, kind, namespace)}/{name}", user=user)
        return found

    def list(self, api_version: str, kind: str, namespace: str | None = None, *, user: str = "admin") -> list[Object]:
        """All of a kind; `namespace=None` is every namespace."""
        items: list[Object] = self.request("GET", self.path(api_version, kind, namespace), user=user)["items"]
        # A list does not repeat on each item what all of them are.
        return [{"apiVersion": api_version, "kind": kind} | item for item in items]

    def delete(
        self, api_version: str, kind: str, name: str, namespace: str = "default", *, user: str = "admin"
    ) -> None:
        options = {"gracePeriodSeconds": 0, "propagationPolicy": "Background"}
        self.request("DELETE", f"{self.path(api_version, kind, namespace)}/{name}", options, user=user)

    def set_status(self, item: Mapping[str, Any], **status: Any) -> Object:
        """Merge `status` into the status subresource of a live object."""
        meta = item["metadata"]
        path = f"{self.path(item['apiVersion'], item['kind'], meta.get('namespace'))}/{meta['name']}/status"
        patch = {"status": status}
        found: Object = self.request("PATCH", path, patch, content_type="application/merge-patch+json")
        return found

    def create_namespace(self, prefix: str = "t") -> str:
        name = f"{prefix}-{secrets.token_hex(4)}"
        self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def remove_namespace(self, name: str) -> None:
        """Delete everything in it, finalizers or not, then the namespace itself."""
        self._kinds.clear()
        self._discover()
        for (api_version, kind), (_, namespaced) in list(self._kinds.items()):
            if not namespaced or kind in {"Event", "Binding"} or api_version.startswith("metrics."):
                continue
            base = self.path(api_version, kind, name)
            with contextlib.suppress(KubeError):
                for item in self.request("GET", base)["items"]:
                    path = f"{base}/{item['metadata']['name']}"
                    if item["metadata"].get("finalizers"):
                        patch = {"metadata": {"finalizers": None}}
                        self.request("PATCH", path, patch, content_type="application/merge-patch+json")
                    with contextlib.suppress(KubeError):
                        self.request("DELETE", path, {"gracePeriodSeconds": 0})
        with contextlib.suppress(KubeError):
            self.request("DELETE", f"/api/v1/namespaces/{name}")
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "spec": {"finalizers": []}}
            self.request("PUT", f"/api/v1/namespaces/{name}/finalize", body)

    def path(self, api_version: str, kind: str, namespace: str | None) -> str:
        """Collection path of a kind, through discovery."""
        known = self._kinds.get((api_version, kind))
        if known is None:
            self._discover(api_version)
            known = self._kinds.get((api_version, kind))
        if known is None:
            raise KubeError(404, f"{api_version} {kind} is not served")
        plural, namespaced = known
        root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        return f"{root}/namespaces/{namespace}/{plural}" if namespaced and namespace else f"{root}/{plural}"

    # -- inside -------------------------------------------------------------------------------------------------------

    def _discover(self, api_version: str | None = None) -> None:
        versions = [api_version]
        if api_version is None:
            groups = self.request("GET", "/apis")["groups"]
            versions = ["v1", *(version["groupVersion"] for group in groups for version in group["versions"])]
        for version in filter(None, versions):
            with contextlib.suppress(KubeError):
                found = self.request("GET", f"/apis/{version}" if "/" in version else f"/api/{version}")
                for entry in found["resources"]:
                    if "/" not in entry["name"] and "list" in entry["verbs"]:
                        self._kinds[version, entry["kind"]] = (entry["name"], entry["namespaced"])

    def _wait_served(self, crd: Object) -> None:
        names, group = crd["spec"]["names"], crd["spec"]["group"]
        until = time.monotonic() + READY_TIMEOUT_S
        for version in (entry["name"] for entry in crd["spec"]["versions"] if entry["served"]):
            while time.monotonic() < until:
                # The group's document changes a moment before the handler exists: ask for both.
                self._kinds.pop((f"{group}/{version}", names["kind"]), None)
                with contextlib.suppress(KubeError):
                    self.request("GET", f"{self.path(f'{group}/{version}', names['kind'], None)}?limit=1")
                    break
                time.sleep(0.02)
            else:
                raise TimeoutError(f"CRD {names['plural']}.{group} is not served")

    def _connection(self, *, fresh: bool) -> http.client.HTTPSConnection:
        """A kept connection that no other thread uses, or a new one."""
        with contextlib.suppress(queue.Empty):
            while True:
                kept = self._idle.get_nowait()
                if not fresh and kept.port == self.port:
                    return kept
                kept.close()
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self._tls)

    def _write_tokens(self) -> None:
        groups = {"admin": "system:masters", "controller": _ACCOUNT_GROUPS}
        rows = [
            f'{token},{self.user_name(user)},uid-{user},"{groups.get(user, "")}"\n'
            for user, token in self._tokens.items()
        ]
        (self.folder / "tokens.csv").write_text("".join(rows))

    def _etcd_command(self, etcd: Path) -> list[str]:
        peer, client = f"http://127.0.0.1:{self._peer_port}", f"http://127.0.0.1:{self._etcd_port}"
        urls = {
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
        }
        flags = [f"--{name}={value}" for name, value in urls.items()]
        quick = ["--unsafe-no-fsync", "--log-level=warn", f"--data-dir={self.folder}/etcd"]
        return [str(etcd), *flags, *quick, *self.etcd_flags]

    def _server_command(self, apiserver: Path) -> list[str]:
        return [
            str(apiserver),
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--tls-cert-file={self.folder}/apiserver.crt",
            f"--tls-private-key-file={self.folder}/apiserver.key",
            f"--client-ca-file={self.ca_file}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder}/sa.pub",
            f"--service-account-signing-key-file={self.folder}/sa.key",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--endpoint-reconciler-type=none",
            # With a watch open, SIGTERM would otherwise take a minute.
            "--shutdown-watch-termination-grace-period=1s",
            *self.flags,
        ]

    def _controllers_command(self) -> list[str]:
        certificate = {"client-certificate": str(self.client_cert), "client-key": str(self.client_key)}
        return [
            str(controller_manager()),
            f"--kubeconfig={self.kubeconfig('controllers', credentials=certificate)}",
            f"--controllers={','.join(self.controllers)}",
            f"--service-account-private-key-file={self.folder}/sa.key",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=500",
            "--kube-api-burst=500",
        ]

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        libc = ctypes.CDLL(None, use_errno=True)
        with (self.folder / log).open("ab") as out:
            started = self._starter.submit(
                subprocess.Popen,
                command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt at the terminal is for the test run, which then closes us
                # A test run that is killed takes its servers along.
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
            return started.result()

    def _wait_ready(self) -> bool:
        until = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < until:
            if (
                self._server is None
                or self._server.poll() is not None
                or (self._etcd and self._etcd.poll() is not None)
            ):
                return False
            with contextlib.suppress(KubeError, OSError, http.client.HTTPException):
                self.request("GET", "/readyz")
                self.request("GET", "/api/v1/namespaces/default")
                return True
            time.sleep(0.05)
        return False

    def _etcd_call(self, path: str, body: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise KubeError(response.status, text.decode())
        return json.loads(text)

    @staticmethod
    def _end(process: subprocess.Popen[bytes] | None, how: signal.Signals) -> None:
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait(10)


_SPARE = tuple(f"u{n}" for n in range(10))
_ACCOUNT_GROUPS = "system:serviceaccounts,system:serviceaccounts:arks-system"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _objects(documents: Iterable[Document]) -> Iterable[Object]:
    for document in documents:
        if isinstance(document, Mapping):
            yield from document["items"] if document.get("kind", "").endswith("List") else [dict(document)]
        elif isinstance(document, Path) and document.is_dir():
            yield from _objects(sorted(document.rglob("*.yaml")))
        else:
            text = document.read_text() if isinstance(document, Path) else document
            yield from (item for item in yaml.safe_load_all(text) if item)


if __name__ == "__main__":
    for built in (*binaries(), controller_manager()):
        print(built)
