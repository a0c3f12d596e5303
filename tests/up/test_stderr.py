"""What a machine reads is JSON alone: no library writes a line of its own between ours."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "manifests" / "quickstart"
TIMEOUT_S = 60.0


@pytest.fixture
def extproc(tmp_path):
    """Starts `arks extproc` on grpcio's server end; returns the process and what it wrote so far, as text."""
    started = []

    def start(*flags, policy=("--policy", str(QUICKSTART)), **variables):
        log = tmp_path / f"{len(started)}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ARKS_", "COV_", "GRPC_"))}
        command = [*(sys.executable, "-m", "arks", "extproc", "--transport", "grpc_aio", "--log-format", "json")]
        command += [*policy, "--state", str(tmp_path / f"state-{len(started)}")]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--admin", "127.0.0.1:0", *flags], stdout=out, stderr=out, cwd=ROOT, env=clean | variables
            )
        started.append(process)
        return process, log.read_text

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(check):
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def events(text):
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_an_address_that_is_taken_is_told_with_its_flag_in_json_alone(extproc):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        for flag in ("--listen", "--admin"):
            # Of a flag given twice the last one counts.
            process, said = extproc("--listen", "127.0.0.1:0", flag, taken)
            assert process.wait(TIMEOUT_S) == 1
            assert events(said()) == ["cannot start"]
            assert f"{flag} {taken}: " in json.loads(said())["error"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")
def test_who_knocks_on_a_tls_port_without_tls_writes_nothing_into_the_log(extproc, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*new, *files], check=True, capture_output=True)
    tls = ("--listen", "127.0.0.1:0", "--tls-certificate", str(certificate), "--tls-key", str(key))

    def knock(**variables):
        process, said = extproc(*tls, **variables)
        listen = until(lambda: re.search(r'"listen": "127.0.0.1:(\d+)"', said()))
        with socket.create_connection(("127.0.0.1", int(listen[1])), timeout=60) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            while plain.recv(1 << 16):  # until the refusal is over
                pass
        return process, said

    process, said = knock()
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0
    assert events(said()) == ["serving", "draining", "stopped"]
    # Who looks for a fault of grpcio's own can have its lines: without our word they are there.
    _, said = knock(GRPC_VERBOSITY="INFO")
    until(lambda: "Handshake failed" in said())


def test_a_controller_that_is_not_there_yet_is_waited_for_and_no_error(extproc, tmp_path):
    stream = ("--policy-stream", f"unix:{tmp_path}/policy.sock")
    process, said = extproc("--listen", f"unix:{tmp_path}/extproc.sock", policy=stream)
    until(lambda: "waiting for the first policy" in said())
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0
    assert {json.loads(line)["level"] for line in said().splitlines()} <= {"info", "warning"}
