"""The controller as a process of its own, to be watched, frozen and killed."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness.gateway import sum_series
from tests.harness.kubernetes import PR_SET_PDEATHSIG, KubeApi

NAMESPACE = "arks-system"


class ControllerProcess:
    """`server`: another address of the API server (a proxy's). `real`: the command as it ships, with its own times."""

    def __init__(
        self,
        api: KubeApi,
        folder: Path,
        *,
        user: str = "controller",
        server: str | None = None,
        real: bool = False,
        policy_stream: str | None = None,
    ) -> None:
        self.user = api.user_name(user)
        self._log = folder / f"{user}.log"
        kubeconfig = str(api.kubeconfig(user, server=server))
        if real:
            command = ["-m", "arks", "controller", "--kubeconfig", kubeconfig, "--namespace", NAMESPACE]
            command += ["--admin", "127.0.0.1:0", "--log-format", "json"]
            command += ["--policy-stream", policy_stream] if policy_stream else []
        else:
            settings = {"kubeconfig": kubeconfig, "namespace": NAMESPACE, "admin_port": 0, "identity": user}
            command = ["-m", "tests.reconcile.faults.hasty", json.dumps({**settings, "policy_stream": policy_stream})]
        # An image's default is no subject here, and a developer's own must not get in.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("ARKS_")}
        with self._log.open("ab") as log:
            libc = ctypes.CDLL(None, use_errno=True)
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environ,
                # A test run that is killed takes its controllers along.
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - one system call
            )

    # -- what it says -------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> list[dict[str, Any]]:
        """Its lines so far; what is no JSON (a traceback of the interpreter) as {"raw": line}."""
        return list(self._lines())

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Lines with this event, and these fields (a string: contained)."""
        return [line for line in self._lines() if line.get("event") == event and _has(line, fields)]

    def tracebacks(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if "raw" in line or "exception" in line]

    def _lines(self) -> Iterator[dict[str, Any]]:
        for text in self._log.read_text().splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                yield {"raw": text}

    @property
    def admin(self) -> str:
        started = self.said("controller started")
        return str(started[-1]["admin"]) if started else ""

    def get(self, path: str) -> tuple[int, str]:
        """(0, why) while it does not answer."""
        if not self.admin:
            return 0, "not started"
        connection = http.client.HTTPConnection(self.admin, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels; -1 while it does not answer."""
        status, text = self.get("/metrics")
        if status != 200:
            return -1.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum_series("\n".join(line for line in text.splitlines() if all(each in line for each in wanted)), name)

    @property
    def leads(self) -> bool:
        return self.metric("arks_controller_leader") == 1.0

    def rss_mb(self, *, peak: bool = False) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        ticks = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

    # -- what is done to it -------------------------------------------------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status. Harmless when done twice."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
                self._process.send_signal(signal.SIGCONT)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(60)


def _has(line: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(
        wanted in str(line.get(name, "")) if isinstance(wanted, str) else line.get(name) == wanted
        for name, wanted in fields.items()
    )
