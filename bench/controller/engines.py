"""Many engines' metrics in one process: `python -m bench.controller.engines ADDRESS COUNT`.

Each is a port of its own; prints them as one JSON list and ends when its stdin does. They answer /health, and /metrics
with a page as long as vLLM 0.32's, with its names; what counts differs a little from look to look, so that nothing can
take one answer for the next. SGLang's /v1/loads they do not know. No request is ever served. /looks of any of them
tells how many pages all of them gave.
"""

import asyncio
import contextlib
import json
import random
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import aiohttp

PAGE_BYTES = 60_000
_LABELS = 'engine="0",model_name="model"'


def _histograms() -> bytes:
    """The rest of a page: bucket after bucket, of which nothing is wanted."""
    lines: list[str] = []
    size = number = 0
    while size < PAGE_BYTES:
        name = f"vllm:request_stage_{number // 20}_seconds"
        if number % 20 == 0:
            lines += [f"# HELP {name} Histogram of one stage of a request.", f"# TYPE {name} histogram"]
        lines.append(f'{name}_bucket{{{_LABELS},le="{number % 20 / 10:.1f}"}} {number * 17}.0')
        size += sum(map(len, lines[-1:])) + 1
        number += 1
    return ("\n".join(lines) + "\n").encode()


_REST = _histograms()


def _page() -> bytes:
    figures = {
        "num_requests_running": random.randint(6, 10),
        "num_requests_waiting": random.randint(0, 1),
        "kv_cache_usage_perc": round(random.uniform(0.30, 0.35), 4),
        "time_to_first_token_seconds_sum": 1234.5,
        "time_to_first_token_seconds_count": 9876,
    }
    return "".join(f"vllm:{name}{{{_LABELS}}} {value}\n" for name, value in figures.items()).encode() + _REST


class _Engine(asyncio.Protocol):
    """Just enough HTTP/1.1: a request is a head, and all of it comes at once."""

    def __init__(self, looks: Counter[str]) -> None:
        self._looks = looks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        path = data.split(b" ", 2)[1]
        status, body = b"200 OK", b""
        if path == b"/metrics":
            self._looks["pages"] += 1
            body = _page()
        elif path == b"/looks":
            body = b"%d" % self._looks["pages"]
        elif path != b"/health":
            status = b"404 Not Found"
        head = b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self._transport.write(head + body)


@contextlib.contextmanager
def running(count: int) -> Iterator[list[str]]:
    """So many engines in a process of their own; their addresses, ip:port."""
    command = [sys.executable, "-m", "bench.controller.engines", own_address(), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


async def looks(engine: str) -> int:
    """Pages that all of them have given so far."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{engine}/looks") as answer:
        return int(await answer.text())


def own_address() -> str:
    """This machine's: the API server takes no loopback address for a pod's. SystemExit where it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # chooses the address; nothing is sent
        except OSError:
            raise SystemExit("this machine has no network, and so no address that a pod could have") from None
        return str(asked.getsockname()[0])


async def serve(address: str, count: int) -> None:
    """Until stdin ends. Raises OSError where the system allows too few open files."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.get_running_loop()
    ports = []
    looks: Counter[str] = Counter()
    for _ in range(count):
        listening = socket.create_server((address, 0), backlog=16)
        ports.append(listening.getsockname()[1])
        await loop.create_server(lambda: _Engine(looks), sock=listening)
    print(json.dumps([f"{address}:{port}" for port in ports]), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
