"""`arks up` with real child processes: it says when it serves, heals what dies, stops in order, and gives reasons."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.up.conftest import DRIVER, ROOT, SECRET, Running, eventually

CHAT = {"model": "qwen-7b", "messages": [{"role": "user", "content": "Hello!"}]}


def post(url, body, timeout_s=30):
    headers = {"authorization": f"Bearer {SECRET}", "content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=timeout_s)


def status(url, body):
    try:
        with post(url, body) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def running(tmp_path_factory, policy):
    """One for the tests that leave it serving."""
    variables = {"ARKS_LOG_LEVEL": "info", "ARKS_TLS_KEY": __file__}
    running = Running(tmp_path_factory.mktemp("g"), "--policy", str(policy), env=variables).wait_ready()
    yield running
    running.close()


def test_ready_is_one_json_line_and_the_printed_curl_works(start):
    running = start().wait_ready()
    assert set(running.ready) == {"event", "gateway", "admin"}
    assert status(running.ready["gateway"], CHAT) == 200
    with urllib.request.urlopen(f"{running.ready['admin']}/readyz") as answer:
        assert json.load(answer)["ready"] is True
    curls = eventually(lambda: [line for line in running.stderr.splitlines() if line.startswith("curl ")])
    assert len(curls) == 2
    plain, streamed = (
        subprocess.check_output(line, shell=True, text=True, env={**os.environ, "TOKEN": SECRET}) for line in curls
    )
    assert json.loads(plain)["choices"]
    assert streamed.rstrip().endswith("data: [DONE]")
    running.interrupt()
    assert running.finish() == 0
    assert running.process.stdout.read() == b"", "stdout is for the ready line alone"
    assert SECRET not in running.stderr, "a secret of the user's own policy stays out of the log"
    assert SECRET not in running.stderr.partition("Ctrl-C")[2], "logs do not"


def test_ctrl_c_finishes_an_open_stream_and_leaves_nothing_behind(start):
    running = start().wait_ready()
    children = running.children()
    assert len(children) == 4
    answer = post(running.ready["gateway"], {**CHAT, "stream": True, "max_tokens": 100})
    first = answer.readline()
    running.interrupt()
    rest = answer.read()
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert running.finish() == 0
    assert "standin: settled" in running.stderr
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]


def test_a_terminal_that_closes_finishes_an_open_stream_though_nobody_reads_the_log(start):
    read_end, write_end = os.pipe()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup ours is ignored, and children inherit it
    try:
        running = start(stderr=write_end).wait_ready()
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(write_end)
    os.close(read_end)
    gateway = running.ready["gateway"]
    assert [status(gateway, CHAT) for _ in range(3)] == [200] * 3
    with post(gateway, {**CHAT, "stream": True, "max_tokens": 100}) as answer:
        first = answer.readline()
        running.process.send_signal(signal.SIGHUP)
        assert answer.read().rstrip().endswith(b"data: [DONE]")
    assert first.startswith(b"data: ")
    assert running.finish() == 0


def test_a_closed_stderr_is_no_reason_not_to_serve(policy, tmp_path):
    command = [sys.executable, str(DRIVER), "--state", str(tmp_path / "s"), "--listen", "127.0.0.1:0"]
    command += ["--admin", "127.0.0.1:0", "--policy", str(policy)]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    with subprocess.Popen(closed, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        try:
            line = process.stdout.readline()
            assert line
            assert status(json.loads(line)["gateway"], CHAT) == 200
        finally:
            process.terminate()
        assert process.wait(100) == 0


def test_a_second_ctrl_c_is_immediate(start):
    running = start().wait_ready()
    children = running.children()
    with post(running.ready["gateway"], {**CHAT, "stream": True, "max_tokens": 2000}) as answer:
        answer.readline()
        running.interrupt()
        eventually(lambda: '"stopping"' in running.stderr)
        running.interrupt()
        # The drain alone would take its 30 s, and end with 0.
        assert running.finish() == 130
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]


def test_a_drain_ends_at_its_bound(start):
    running = start("--drain-timeout-s", "0.5").wait_ready()
    with post(running.ready["gateway"], {**CHAT, "stream": True, "max_tokens": 5000}) as answer:
        answer.readline()
        running.process.terminate()
        assert running.finish() == 0
    assert "streams cut" in running.stderr


def test_ctrl_c_in_a_terminal_reaches_the_supervisor_alone(running):
    groups = {os.getpgid(pid) for pid in running.children().values()}
    assert os.getpgid(running.process.pid) not in groups


def test_parts_that_die_come_back(running):
    gateway = running.ready["gateway"]
    for word in ("standin_extproc", "simengine", "envoy.json"):
        killed = running.child(word)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda killed=killed: not Path(f"/proc/{killed}").exists())
        eventually(lambda word=word: any(word in command for command in running.children()))
        eventually(lambda: [status(gateway, CHAT) for _ in range(6)] == [200] * 6)


def test_an_envoy_that_dies_while_the_disk_is_full_comes_back(running):
    pid = running.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        killed = running.child("envoy.json")
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{killed}").exists())
        eventually(lambda: status(running.ready["gateway"], CHAT) == 200)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_part_that_keeps_dying_ends_everything_with_its_reason(start):
    running = start(env={"STANDIN_FAULT": "dies"}).wait_ready()
    os.kill(running.child("standin_extproc"), signal.SIGUSR1)
    assert running.finish(200) == 1
    assert "extproc died 4 times within 60 s; extproc did not start: it ended with status 3" in running.stderr
    assert not running.children()


def test_a_part_that_cannot_start_gives_its_last_words_without_secrets(start):
    running = start(env={"STANDIN_FAULT": "broken-policy"})
    assert running.finish() == 1
    assert running.process.stdout.read() == b""
    reason = running.stderr.partition("arks: error: ")[2]
    assert "extproc did not start: it ended with status 1" in reason
    assert "tokens.yaml:7: spec.qos" in reason
    assert SECRET not in reason


def test_ctrl_c_while_starting_stops_at_once(start, tmp_path):
    silent = tmp_path / "envoy"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    running = start("--envoy", str(silent))
    eventually(lambda: any("sleep" in command for command in running.children()))
    children = running.children()
    running.interrupt()
    assert running.finish() == 0
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]


def test_a_killed_supervisor_takes_its_parts_along(start):
    running = start().wait_ready()
    children = running.children()
    running.process.kill()
    eventually(lambda: not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()])


def test_an_envoy_that_is_none_is_named(start, tmp_path):
    broken = tmp_path / "envoy"
    broken.write_text("not a program")
    broken.chmod(0o755)
    running = start("--envoy", str(broken))
    assert running.finish() == 1
    assert f"envoy cannot be run: Exec format error: {broken}" in running.stderr


def test_a_taken_port_names_the_flag(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("--listen", "--admin"):
            running = start(flag, address)
            assert running.finish() == 2
            assert f"{flag} {address}: Address already in use" in running.stderr


def test_two_gateways_run_side_by_side_but_not_in_one_state_folder(start, tmp_path):
    first = start(state=tmp_path / "one").wait_ready()
    second = start(state=tmp_path / "two").wait_ready()
    third = start(state=tmp_path / "one")
    assert third.finish() == 2
    assert "another `arks up` uses this folder" in third.stderr
    for running in (first, second):
        assert status(running.ready["gateway"], CHAT) == 200


def test_a_state_folder_too_deep_for_sockets_still_works(start, tmp_path):
    deep = tmp_path.joinpath(*["a-rather-long-folder-name"] * 5)
    running = start(state=deep).wait_ready()
    assert status(running.ready["gateway"], CHAT) == 200
    private = Path(running.envoy_admin).parent
    assert private.stat().st_mode & 0o077 == 0
    running.interrupt()
    assert running.finish() == 0
    assert not private.exists()


def test_its_own_variables_do_not_leak_into_the_parts(running):
    environ = Path(f"/proc/{running.child('standin_extproc')}/environ").read_bytes()
    assert b"ARKS_" not in environ
