"""The program: one ready line, logs apart, drain on SIGTERM, clear refusals."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator

from tests.simengine.raw import CHAT, Raw, chat


@contextlib.asynccontextmanager
async def program(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "simengine", *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ready(process: asyncio.subprocess.Process) -> str:
    line = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    assert line["event"] == "ready"
    return line["url"]


async def connect(url: str) -> Raw:
    host, port = url.removeprefix("http://").split(":")
    return Raw(*await asyncio.open_connection(host, int(port)))


async def test_sigterm_finishes_streams_and_refuses_new_connections():
    async with program("--listen", "127.0.0.1:0", "--model", "m", "--itl-ms", "10") as process:
        url = await ready(process)
        raw, idle = await connect(url), await connect(url)
        raw.post(CHAT, chat(model="m", stream=True, max_tokens=30))
        await raw.head()
        await raw.chunk()
        process.send_signal(signal.SIGTERM)
        assert await idle.rest() == b""
        assert (await raw.chunks())[-1] == b"data: [DONE]\n\n"
        assert await raw.rest() == b""
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert await process.stdout.read() == b"", "one line only"
        for each in (raw, idle):
            each.writer.close()


async def test_what_does_not_finish_in_time_is_cut():
    flags = ("--listen", "127.0.0.1:0", "--ttft-ms", "60000", "--shutdown-timeout-s", "0.1")
    async with program(*flags) as process:
        raw = await connect(await ready(process))
        raw.post(CHAT, chat(stream=True))
        await raw.head()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 1
        raw.writer.close()


async def test_it_listens_on_a_unix_socket(tmp_path):
    path = tmp_path / "engine.sock"
    async with program("--listen", f"unix:{path}") as process:
        assert await ready(process) == f"unix:{path}"
        raw = Raw(*await asyncio.open_unix_connection(path))
        raw.post(CHAT, chat())
        assert (await raw.answer())[0] == 200
        raw.writer.close()
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 0
        assert not path.exists()


async def test_a_taken_port_and_a_wrong_flag_end_it_with_a_reason():
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with program("--listen", f"127.0.0.1:{port}") as process:
            _, errors = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 1
            assert b"cannot listen" in errors
    async with program("--fault", "nonsense") as process:
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 2
        assert b"nonsense" in errors
