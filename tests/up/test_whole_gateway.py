"""`arks up` as a user starts it, every part the real one."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.up.conftest import ROOT, eventually


@pytest.fixture
def arks(tmp_path):
    main = tmp_path / "arks_up.py"
    main.write_text("import sys\nfrom arks.cli import main\nsys.exit(main(['up', *sys.argv[1:]]))\n")
    return main


@pytest.fixture
def engine():
    command = [sys.executable, "-m", "simengine", "--listen", "127.0.0.1:0", "--model", "Org/Tiny-1B", "--seed", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()


def run_line(line):
    return subprocess.check_output(line, shell=True, text=True)


def curls(running):
    return eventually(lambda: [line for line in running.stderr.splitlines() if line.startswith("curl ")])


def usage(running, *flags):
    command = [sys.executable, "-m", "arks", "usage", "--state", str(running.state), "--json", *flags]
    text = subprocess.check_output(command, text=True, cwd=ROOT)
    return [json.loads(line) for line in text.splitlines()]


def test_nothing_given_serves_the_quickstart(start, arks):
    running = start(driver=arks, policy=None).wait_ready()
    plain, streamed = (run_line(line) for line in curls(running))
    counted = json.loads(plain)["usage"]
    assert streamed.rstrip().endswith("data: [DONE]")
    assert '"usage":{' not in streamed.replace(" ", ""), "nobody asked for it"
    rows = eventually(lambda: [row for row in [usage(running)] if len(row) == 2])[0]
    assert [row["stream"] for row in rows] == [False, True]
    assert rows[0]["prompt_tokens"] == counted["prompt_tokens"]
    assert all(row["accuracy"] == "exact" for row in rows)
    with urllib.request.urlopen(f"{running.ready['admin']}/metrics") as answer:
        text = answer.read().decode()
    assert 'gateway_requests_total{namespace="default",model="qwen-7b",status="200"} 2' in text
    running.interrupt()
    assert running.finish() == 0
    assert len(usage(running)) == 2
    assert "sk-test123456" not in running.stderr.partition("Ctrl-C")[2]


def test_an_engine_alone_is_enough_for_a_working_curl(start, arks, engine):
    running = start("--engine", engine, driver=arks, policy=None).wait_ready()
    plain, _ = curls(running)
    assert '"model": "Org/Tiny-1B"' in plain
    assert json.loads(run_line(plain))["choices"]
    assert eventually(lambda: usage(running, "--limit", "1"))[0]["model"] == "Org/Tiny-1B"
    assert running.state.stat().st_mode & 0o077 == 0


def test_a_missing_engine_is_the_reason(start, arks):
    running = start("--engine", "http://127.0.0.1:1", driver=arks, policy=None)
    assert running.finish() == 1
    assert "--engine http://127.0.0.1:1: cannot be reached" in running.stderr


def test_a_full_disk_is_the_reason(start, arks):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
    arks.write_text(limit + arks.read_text())
    running = start("--engine", "http://127.0.0.1:1", driver=arks)
    assert running.finish() == 1
    assert f"Is there room under --state {running.state}?" in running.stderr.partition("arks: error: ")[2]
    assert "Traceback" not in running.stderr


def test_a_broken_policy_refuses_to_start_and_says_where(start, arks, tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "tokens.yaml").write_text(
        "apiVersion: arks.ai/v1\nkind: ArksToken\nmetadata: {name: a}\nspec:\n  token: sk-quite-secret\n  qos: 7\n"
    )
    running = start(driver=arks, policy=folder)
    assert running.finish() == 1
    reason = running.stderr.partition("arks: error: ")[2]
    assert "tokens.yaml" in reason
    assert "qos" in reason
    assert "6" in reason.partition("tokens.yaml")[2][:12], "the line"
    assert "sk-quite-secret" not in running.stderr


def test_both_transports_serve(start, arks):
    running = start("--transport", "grpc_aio", driver=arks).wait_ready()
    request = urllib.request.Request(f"{running.ready['gateway']}/v1/models")
    request.add_header("authorization", "Bearer sk-secret-of-alice")
    with urllib.request.urlopen(request) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["qwen-7b"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{running.ready['gateway']}/v1/models")
    refused.value.close()
    assert refused.value.code == 401
    assert Path(f"/proc/{running.child('extproc')}").exists()
