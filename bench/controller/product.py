"""`arks controller` and `arks extproc` as the pod runs them, the policy stream between them on a unix socket."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

from bench.process import cpu_s, peak_mb, resident_mb

STOP_S = 30.0


class Process:
    """One of the two commands; a context manager that ends it as a pod's end does, with SIGTERM."""

    def __init__(self, name: str, flags: list[str], folder: Path) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        command = [sys.executable, "-m", "arks", name, *flags, "--admin", "127.0.0.1:0", "--log-format", "json"]
        self.began_s = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self._process.pid
        self._admin = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def age_s(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began_s

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    @property
    def resident_mb(self) -> float:
        return resident_mb(self.pid)

    @property
    def peak_mb(self) -> float:
        return peak_mb(self.pid)

    def _found_admin(self) -> str:
        """Empty until it is known."""
        for line in "" if self._admin else self._log.read_text(errors="replace").splitlines():
            if '"admin"' in line:
                self._admin = f"http://{json.loads(line)['admin']}"
                break
        return self._admin

    async def get(self, path: str) -> tuple[int, str]:
        """Of its admin port; status 0 while it does not answer. SystemExit, with its last words, where it has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"arks {self.name} ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        admin = self._found_admin()
        if not admin:
            return 0, ""
        try:
            async with aiohttp.ClientSession() as session, session.get(admin + path) as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientConnectionError:
            return 0, ""

    async def ready(self, timeout_s: float = 120.0) -> float:
        """Seconds from its start until /readyz said yes."""
        while (await self.get("/readyz"))[0] != 200:
            if self.age_s > timeout_s:
                raise SystemExit(f"arks {self.name} is not ready after {timeout_s:.0f} s: {await self.get('/readyz')}")
            await asyncio.sleep(0.05)
        return self.age_s

    async def metric(self, name: str) -> float:
        """The sum of its series."""
        _, text = await self.get("/metrics")
        lines = (line.rpartition(" ") for line in text.splitlines())
        return sum(float(value) for head, _, value in lines if head == name or head.startswith(name + "{"))


class Pod:
    """The commands of one pod, in one folder."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        folder.mkdir()
        self._kubeconfig, self._folder = kubeconfig, folder
        self.listen, self._stream = f"unix:{folder / 'extproc.sock'}", f"unix:{folder / 'policy.sock'}"

    def controller(self) -> Process:
        flags = ["--kubeconfig", str(self._kubeconfig), "--namespace", "arks-system", "--policy-stream", self._stream]
        return Process("controller", flags, self._folder)

    def extproc(self) -> Process:
        flags = ["--policy-stream", self._stream, "--listen", self.listen, "--state", str(self._folder / "state")]
        return Process("extproc", flags, self._folder)


async def policy_of(extproc: Process) -> dict[str, Any]:
    """What /readyz says of the policy in force."""
    found: dict[str, Any] = json.loads((await extproc.get("/readyz"))[1])["checks"]["policy"]
    return found
