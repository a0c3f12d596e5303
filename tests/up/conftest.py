"""A running `arks up` around the stand-in extproc, as a child process with real parts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from apis.eds import write_eds

SECRET = "sk-secret-of-alice"
POLICY = f"""
apiVersion: arks.ai/v1
kind: ArksEndpoint
metadata: {{name: qwen-7b, namespace: default}}
spec: {{gatewayRef: {{name: arks}}}}
---
apiVersion: arks.ai/v1
kind: ArksToken
metadata: {{name: alice, namespace: default}}
spec:
  token: {SECRET}
  qos: [{{arksEndpoint: {{name: qwen-7b}}, rateLimits: [{{type: rpm, value: 100}}]}}]
"""
DRIVER = Path(__file__).with_name("driver.py")
ROOT = Path(__file__).parents[2]


class Running:
    """One `arks up`: what it printed, and how it ended."""

    def __init__(self, state, *flags, env=None, driver=DRIVER, stderr=subprocess.PIPE):
        self.state = state
        command = [sys.executable, str(driver), "--state", str(state), "--listen", "127.0.0.1:0"]
        command += ["--admin", "127.0.0.1:0", *flags]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ARKS_", "COV_"))}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**clean, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        self._errors = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = None

    def _read(self):
        for line in self.process.stderr or ():
            self._errors.append(line)

    @property
    def stderr(self):
        return b"".join(self._errors).decode()

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.finish()}\n{self.stderr}"
        self.ready = json.loads(line)
        return self

    def finish(self, timeout_s=100):
        status = self.process.wait(timeout_s)
        self._reader.join(60)
        return status

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def children(self):
        """{part's command line: pid}"""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid = stat.parent.name
                if int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found[(stat.parent / "cmdline").read_bytes().decode().replace("\0", " ")] = int(pid)
        return found

    def child(self, word):
        return next(pid for command, pid in self.children().items() if word in command)

    @property
    def eds_file(self):
        return self.state / "run" / "eds" / "engines.json"

    @property
    def envoy_admin(self):
        return (self.state / "envoy-admin").read_text().strip().removeprefix("unix:")

    def engines(self, addresses):
        write_eds(self.eds_file, addresses)

    def close(self):
        if self.process.poll() is None:
            self.interrupt()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.stdout.close()
        self._reader.join(60)
        if self.process.stderr is not None:
            self.process.stderr.close()


def eventually(holds, timeout_s=60, pause_s=0.05):
    deadline = time.monotonic() + timeout_s
    while not (got := holds()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(pause_s)
    return got


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    (folder / "policy.yaml").write_text(POLICY)
    return folder


@pytest.fixture
def start(tmp_path, policy):
    started = []

    def starter(*flags, state=tmp_path / "s", policy=policy, **more):
        given = ("--policy", str(policy)) if policy else ()
        running = Running(state, *given, *flags, **more)
        started.append(running)
        return running

    yield starter
    for running in started:
        running.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, policy):
    """One for all tests of a module; each gives it its own engines."""
    state = tmp_path_factory.mktemp("g")
    running = Running(state, "--policy", str(policy), "--engine", "127.0.0.1:1").wait_ready()
    yield running
    running.close()
