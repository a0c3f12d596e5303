"""What a kubelet does with a generated pod, for one container of it, without a container: the very command line runs.

Only what a node would put in its place differs: a mount's path becomes the folder that stands for the volume, `$(NAME)`
is expanded, and the image's own environment (its PATH above all) is the engines' environment. Each pod has an address
of its own on the loopback network, so that ports are those of the pod; a server that listens on every address of its
pod must be told that one (`--host $POD_IP`), for here all pods share one network. Nothing else of this machine's
environment reaches the process.
"""

import contextlib
import http.client
import itertools
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import engines
from tests.engines_real.process import ENGINE_NICE

START_TIMEOUT_S = 900.0
"""half a minute on a quiet machine; the engine gives way to everything else"""
IMAGE = {
    "PATH": f"{engines.environment()}/bin:/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # An image has what it needs; nothing here may ask the network.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_REFERENCE = re.compile(r"\$(?:\$|\(([-._a-zA-Z0-9]+)\))")
_octets = itertools.count(1)

Object = Mapping[str, Any]


def pod_address() -> str:
    """An address for one pod; two runs of the tests on one machine have different ones."""
    return f"127.{_RUN}.{next(_octets)}"


_RUN = f"{secrets.randbelow(200) + 32}.{secrets.randbelow(256)}"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as Kubernetes reads it: what is unknown stays, `$$` is an escaped `$`."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] is None else variables.get(found[1], found[0])

    return _REFERENCE.sub(value, text)


def pod(template: Object, name: str, namespace: str = "default") -> dict[str, Any]:
    """The pod that a workload's controller would make of a template."""
    metadata = {**template.get("metadata", {}), "name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@dataclass
class Container:
    """One container of a pod. `volumes`: the folder that stands for each of its volumes, by the volume's name;
    `injected`: variables that another controller's webhook would have added.
    """

    pod: Object = field(repr=False)
    folder: Path
    volumes: Mapping[str, Path] = field(default_factory=dict)
    injected: Mapping[str, str] = field(default_factory=dict)
    image: Mapping[str, str] = field(default_factory=lambda: IMAGE)
    name: str = ""
    address: str = field(default_factory=pod_address)
    _process: subprocess.Popen[bytes] | None = None

    # -- what the pod says --------------------------------------------------------------------------------------------

    @property
    def spec(self) -> dict[str, Any]:
        containers: list[dict[str, Any]] = self.pod["spec"]["containers"]
        return next(each for each in containers if self.name in ("", each["name"]))

    @property
    def environment(self) -> dict[str, str]:
        found = {**self.image, "HOME": str(self.folder), "HOSTNAME": self.pod["metadata"]["name"], **self.injected}
        for item in self.spec.get("env", ()):
            found[item["name"]] = self._placed(self._value(item, found))
        return found

    def _value(self, item: Object, variables: Mapping[str, str]) -> str:
        if "valueFrom" not in item:
            return expand(item.get("value", ""), variables)
        path: str = item["valueFrom"]["fieldRef"]["fieldPath"]
        if path == "status.podIP":
            return self.address
        tree: Any = self.pod
        if "['" in path:
            path, _, key = path.removesuffix("']").partition("['")
            return str(self.pod["metadata"][path.removeprefix("metadata.")][key])
        for part in path.split("."):
            tree = tree[part]
        return str(tree)

    def _placed(self, text: str) -> str:
        """Paths below a mount, alone or after an `=`, below the folder of its volume."""
        for mount in self.spec.get("volumeMounts", ()):
            if mount["name"] in self.volumes:
                where = self.volumes[mount["name"]] / mount.get("subPath", "")
                text = re.sub(rf"(^|=){re.escape(mount['mountPath'])}(?=/|$)", rf"\g<1>{where}", text)
        return text

    @property
    def command(self) -> list[str]:
        whole = [*self.spec.get("command", ()), *self.spec.get("args", ())]
        return [self._placed(expand(each, self.environment)) for each in whole]

    def port(self, name: str) -> int:
        return next(int(each["containerPort"]) for each in self.spec["ports"] if each["name"] == name)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port('http')}"

    @property
    def grace_s(self) -> float:
        return float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))

    # -- what a kubelet does ------------------------------------------------------------------------------------------

    @property
    def log_file(self) -> Path:
        return self.folder / "container.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as sink:
            self._process = self._spawn(self.command, sink)
        with contextlib.suppress(OSError):  # a kernel without autogroups
            Path(f"/proc/{self._process.pid}/autogroup").write_text(ENGINE_NICE)

    def _spawn(self, command: list[str], sink: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
        )

    @property
    def exit_status(self) -> int | None:
        """None while it runs; a negative signal's number where one ended it."""
        assert self._process is not None, "not started"
        return self._process.poll()

    def probe(self, kind: str) -> bool:
        """One look: `startup`, `readiness` or `liveness`."""
        asked = self.spec[f"{kind}Probe"]
        timeout_s = asked.get("timeoutSeconds", 1)
        if "exec" in asked:
            return self._exec(asked["exec"]["command"], timeout_s) == 0
        get = asked["httpGet"]
        port = get["port"] if isinstance(get["port"], int) else self.port(get["port"])
        connection = http.client.HTTPConnection(get.get("host") or self.address, port, timeout=timeout_s)
        try:
            connection.request("GET", get.get("path", "/"), headers={"User-Agent": "kube-probe/1.36"})
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_started(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until the startup probe holds (where there is none, readiness); a container that ends raises."""
        kind = "startup" if "startupProbe" in self.spec else "readiness"
        deadline = time.monotonic() + timeout_s
        while not self.probe(kind):
            assert self.exit_status is None, f"ended with {self.exit_status}; its log ends:\n{self.log[-4000:]}"
            assert time.monotonic() < deadline, f"did not start; its log ends:\n{self.log[-4000:]}"
            time.sleep(0.3)

    def wait_ended(self, timeout_s: float) -> int:
        assert self._process is not None, "not started"
        return self._process.wait(timeout_s)

    def pre_stop(self) -> None:
        """The hook that comes before any signal, as long as it takes."""
        hook = self.spec.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook is not None:
            self._exec(hook["command"], self.grace_s)

    def terminate(self) -> None:
        """SIGTERM to the container's first process alone."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Every process of it at once; also what a container's end does to the children of its first process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _exec(self, command: list[str], timeout_s: float) -> int:
        process = self._spawn([self._placed(each) for each in command], subprocess.DEVNULL)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running(*containers: Container) -> Iterator[None]:
    """All of them, started together and served by each; killed at the end."""
    try:
        for each in containers:
            each.start()
        for each in containers:
            each.wait_started()
        yield
    finally:
        for each in containers:
            each.kill()
