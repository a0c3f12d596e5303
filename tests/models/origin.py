"""What every test server shares: it counts what it sends, and fails on command."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field

from aiohttp import web

CUT, STATUS, WRONG, STALL = "cut", "status", "wrong", "stall"


@dataclass
class Origin:
    """One HTTP server on a free port. ``faults[path]`` are used up one by one, in order; with ``forever`` the last
    one stays."""

    faults: dict[str, list[tuple]] = field(default_factory=lambda: defaultdict(list))
    forever: bool = False
    ranges: bool = True
    chunk_bytes: int = 64 << 10
    requests: list[tuple[str, str, dict]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    at_once: int = 0
    most_at_once: int = 0
    pause_s: float = 0.0
    gate: asyncio.Event | None = None
    url: str = ""

    async def start(self, handler):
        async def handle(request):
            self.requests.append((request.method, request.raw_path, dict(request.headers)))
            return await handler(request)

        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{tail:.*}", handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self):
        await self.runner.cleanup()

    @property
    def total_sent(self):
        return sum(self.sent.values())

    def fault(self, name):
        queue = self.faults.get(name)
        if not queue:
            return None
        return queue[0] if self.forever and len(queue) == 1 else queue.pop(0)

    async def send(self, request, name, content, headers=None):
        """The content or the range of it that is asked for, with this name's next fault."""
        fault = self.fault(name)
        if fault and fault[0] == STATUS:
            return web.Response(status=fault[1], headers=fault[2] if len(fault) > 2 else {})
        if fault and fault[0] == WRONG:
            content = bytes(len(content))
        first, last, status = 0, len(content) - 1, 200
        headers = dict(headers or {})
        if self.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))):
            first, last = int(match[1]), min(int(match[2] or last), last)
            if first >= len(content):
                return web.Response(status=416)
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        body = content[first : last + 1]
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for start in range(0, len(body), self.chunk_bytes):
                chunk = body[start : start + self.chunk_bytes]
                if fault and fault[0] == CUT and start + len(chunk) > fault[1]:
                    chunk = chunk[: max(0, fault[1] - start)]
                    await self._write(response, name, chunk)
                    await asyncio.sleep(0.02)
                    request.transport.abort()
                    return response
                if self.gate is not None:
                    await self.gate.wait()
                await self._write(response, name, chunk)
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
            if fault and fault[0] == STALL:
                await asyncio.sleep(fault[1])
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            with contextlib.suppress(Exception):
                request.transport.abort()
        finally:
            self.at_once -= 1
        return response

    async def _write(self, response, name, chunk):
        await response.write(chunk)
        self.sent[name] += len(chunk)


def noise(size, seed=0):
    """Bytes that differ everywhere, so that a piece at a wrong place is noticed."""
    block = b"".join(hashlib.sha256(b"%d %d" % (seed, n)).digest() for n in range(2048))
    return b"".join(
        (hashlib.sha256(b"%d/%d" % (seed, n)).digest() + block[32:]) for n in range(size // len(block) + 1)
    )[:size]
