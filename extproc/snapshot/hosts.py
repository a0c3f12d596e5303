"""Names behind routes become addresses: looked up off the event loop and again, not forgotten when a look-up fails.

A picker names the engine to Envoy as `ip:port`, so somebody must resolve; done here it is off every request's way.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from apis.policy import Endpoint, Policy, Route

REFRESH_S: Final = 30.0
TIMEOUT_S: Final = 5.0
_AT_ONCE: Final = 8

Lookup: TypeAlias = Callable[[str, int], Awaitable[tuple[str, ...]]]
"""host name and port to `ip:port`, sorted"""


async def lookup(host: str, port: int) -> tuple[str, ...]:
    """The system's resolver, in a thread."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ips = sorted({str(sockaddr[0]) for *_, sockaddr in found})
    return tuple(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips)


@dataclass(slots=True)
class Hosts:
    """What each `hostname:port` stood for when it last could be told."""

    lookup: Lookup = lookup
    known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """and why; an address from before stays in use"""

    async def refresh(self, wanted: set[str]) -> bool:
        """Look all of them up; forget the others. True when an address or a failure is new."""
        before = (dict(self.known), dict(self.failed))
        for table in (self.known, self.failed):
            for name in table.keys() - wanted:
                del table[name]
        gate = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._refresh_one(name, gate) for name in sorted(wanted)))
        return before != (self.known, self.failed)

    async def _refresh_one(self, name: str, gate: asyncio.Semaphore) -> None:
        host, _, port = name.rpartition(":")
        try:
            async with gate, asyncio.timeout(TIMEOUT_S):
                self.known[name] = await self.lookup(host, int(port))
            self.failed.pop(name, None)
        except TimeoutError:
            self.failed[name] = f"no answer within {TIMEOUT_S:g} s"
        except (OSError, UnicodeError) as error:
            self.failed[name] = getattr(error, "strerror", None) or "is no host name"

    def applied(self, policy: Policy, previous: Policy) -> Policy:
        """`policy` with the addresses of its hosts. Endpoints equal to `previous`'s are `previous`'s own."""
        changed = {}
        for key, endpoint in policy.endpoints.items():
            if endpoint.routes and any(route.hosts for route in endpoint.routes):
                made = _resolved(endpoint, self.known)
                known = previous.endpoints.get(key)
                changed[key] = known if known == made and known is not None else made
        return Policy(policy.tokens, policy.quotas, {**policy.endpoints, **changed}) if changed else policy


def wanted_hosts(policy: Policy) -> set[str]:
    return {host for endpoint in policy.endpoints.values() for route in endpoint.routes or () for host in route.hosts}


def _resolved(endpoint: Endpoint, known: dict[str, tuple[str, ...]]) -> Endpoint:
    routes = tuple(
        Route(
            route.name,
            route.weight,
            tuple(dict.fromkeys((*route.addresses, *(a for host in route.hosts for a in known.get(host, ()))))),
            route.hosts,
        )
        for route in endpoint.routes or ()
    )
    values = {name: getattr(endpoint, name) for name in endpoint.__struct_fields__}
    return Endpoint(**{**values, "routes": routes})
