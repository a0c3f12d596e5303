"""The admin port: /healthz (the process answers), /readyz (it can decide requests, and if not, why), /metrics.

Started before the first policy is read and closed last, so that a probe sees every state. It only reads: what it tells
comes from callables that the process's owner hands in. Bind it to a private address: /readyz names engines and files.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
from aiohttp import web

from extproc.observe.metrics import CONTENT_TYPE, GatewayMetrics

log = structlog.get_logger()

SHUTDOWN_TIMEOUT_S = 1.0
"""a scrape in progress may take this long once the process goes"""


@dataclass(frozen=True, slots=True)
class Check:
    """One part's state. A part that is not `required` (engines) is told, but does not make the process unready."""

    ok: bool
    detail: Mapping[str, object] = field(default_factory=dict)
    required: bool = True


class AdminServer:
    """Serves on the running loop from `start` to `close`.

    `checks` are asked at each /readyz; one that raises counts as not ok.
    """

    def __init__(self, metrics: GatewayMetrics, checks: Mapping[str, Callable[[], Check]]) -> None:
        self._metrics = metrics
        self._checks = dict(checks)
        self._runner: web.AppRunner | None = None
        self.address = ""
        """HOST:PORT, the real port where 0 was asked for"""

    async def start(self, host: str, port: int) -> None:
        """Raises OSError where the address cannot be had."""
        app = web.Application(client_max_size=1024)
        app.add_routes(
            [web.get("/healthz", _healthz), web.get("/readyz", self._readyz), web.get("/metrics", self._scrape)]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S, handle_signals=False)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError:
            await self.close()
            raise
        bound = self._runner.addresses[0]
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _readyz(self, _request: web.Request) -> web.Response:
        checks = {name: _ask(name, check) for name, check in self._checks.items()}
        ready = all(check.ok for check in checks.values() if check.required)
        told = {name: {"ok": check.ok, **check.detail} for name, check in checks.items()}
        text = json.dumps({"ready": ready, "checks": told}, default=str)
        return web.Response(text=text + "\n", status=200 if ready else 503, content_type="application/json")

    async def _scrape(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": CONTENT_TYPE})
        await response.prepare(request)
        async for piece in self._metrics.exposition():
            await response.write(piece)
        await response.write_eof()
        return response


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _ask(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        log.warning("a readiness check failed to answer", check=name, error=type(error).__name__)
        return Check(ok=False, detail={"error": type(error).__name__})
