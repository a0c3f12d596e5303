"""`arks up --engine URL` and nothing else: the policy is written from what the engine says it serves."""

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.engines_real.client import CHAT, Client, chat
from tests.engines_real.conftest import SERVED


@pytest.fixture
def pointed(engine, tmp_path):
    """(ready line, what stands on stderr)"""
    command = [sys.executable, "-m", "arks", "up", "--engine", engine.url, "--state", str(tmp_path / "state")]
    command += ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--access-log", "off"]
    stderr = tmp_path / "stderr"
    with stderr.open("w") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
    try:
        line = process.stdout.readline()
        assert line, stderr.read_text()[-2000:]
        # The welcome is printed after the ready line.
        deadline = time.monotonic() + 10
        while "Ctrl-C" not in stderr.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield json.loads(line), stderr.read_text()
    finally:
        process.terminate()
        assert process.wait(40) == 0
        process.stdout.close()


async def test_every_served_name_answers(pointed, session, books):
    ready, told = pointed
    secret = told.partition("Authorization: Bearer ")[2].partition("'")[0]
    client = Client(session, ready["gateway"], secret)
    async with session.get(f"{ready['gateway']}/v1/models", headers=client.headers) as answer:
        assert {one["id"] for one in (await answer.json())["data"]} == set(SERVED)
    for model in SERVED:
        answer = await client.ok(CHAT, {**chat(max_tokens=2), "model": model})
        books.aside(answer.json["usage"]["prompt_tokens"], answer.json["usage"]["completion_tokens"])


async def output(line: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*shlex.split(line), stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out


async def test_printed_curl_lines_work(pointed, books, session):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    _, told = pointed
    lines = [line for line in told.splitlines() if line.startswith("curl ")]
    assert len(lines) == 2
    plain, streamed = [await output(line) for line in lines]
    usage = json.loads(plain)["usage"]
    assert streamed.rstrip().endswith(b"data: [DONE]")
    # Rows of another gateway: only the engine's side is known here, the streamed answer's by difference.
    counts = await books.engine.counts(session)
    delta = counts - books.start
    assert delta.prompt == 2 * usage["prompt_tokens"]
    books.aside(delta.prompt, delta.generation)
