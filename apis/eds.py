"""Envoy's view of the engines: one EDS answer in a file, written by extproc as the policy changes, read by Envoy.

Every engine that extproc may pin must be in it: Envoy sends a request whose pin it does not know to its fallback
balancer instead. The file is replaced by rename, which is what Envoy watches its folder for.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENGINES_CLUSTER = "engines"
_TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


def render_eds(addresses: Iterable[str]) -> bytes:
    """An EDS DiscoveryResponse for `ip:port` addresses (IPv6 bracketed); the same set gives the same bytes.

    Raises ValueError for an address that is not `ip:port`.
    """
    known = sorted(set(addresses))
    endpoints = [{"endpoint": {"address": socket_address(address)}} for address in known]
    assignment = {"@type": _TYPE, "cluster_name": ENGINES_CLUSTER, "endpoints": [{"lb_endpoints": endpoints}]}
    version = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    return json.dumps({"version_info": version, "resources": [assignment]}, indent=1).encode()


def write_eds(path: Path, addresses: Iterable[str]) -> None:
    """Replace the file at once; a reader sees the old or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(render_eds(addresses))
    fresh.replace(path)


def socket_address(address: str) -> dict[str, Any]:
    """Envoy's Address of `host:port` or `[v6]:port`; ValueError where it is neither."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or (":" in host and not bracketed):
        raise ValueError(f"{address!r} is not host:port (IPv6 as [address]:port)")
    if int(port) > 65535:
        raise ValueError(f"{address!r}: port {port} is above 65535")
    return {"socket_address": {"address": host[1:-1] if bracketed else host, "port_value": int(port)}}
