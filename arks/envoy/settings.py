"""What is decided about the gateway's Envoy, once, for a bootstrap on one machine and for manifests on Kubernetes."""

from dataclasses import dataclass
from pathlib import Path

from apis.headers import DECIDED_HEADERS, PIN_HEADER
from extproc.settings import BODY_LIMIT_BYTES

OWNED_HEADERS = (PIN_HEADER, f"{PIN_HEADER}-subset", f"{PIN_HEADER}-served", *DECIDED_HEADERS)
"""ours to say: a client's copy is removed at the edge, before any filter reads it"""
OWNED_PREFIXES = ("x-arks-", "x-envoy-")
"""likewise, by prefix. A client's x-envoy-* would steer retries, timeouts and statistics"""

METADATA_NAMESPACES = ("arks", "envoy.lb")
"""dynamic metadata that extproc may write: the decision for the access log, and the pick"""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    listen: str
    """HOST:PORT of the clients' side"""
    extproc: str
    """unix:PATH or HOST:PORT of extproc's gRPC side"""
    eds_file: Path
    """the engines (`apis.eds`), in a folder that Envoy watches"""
    admin: str
    """unix:PATH or HOST:PORT of Envoy's own admin side; it can stop Envoy, so keep it private"""
    access_log: str | None = "/dev/stdout"
    """path; None: no access log"""
    concurrency: int = 1
    """worker threads"""

    body_limit_bytes: int = BODY_LIMIT_BYTES
    """a larger request body is answered 413"""
    connection_buffer_bytes: int = 1024 * 1024
    """what a slow reader may make Envoy hold; request bodies have `body_limit_bytes`"""
    headers_limit_kib: int = 64
    headers_limit: int = 200
    """more or longer request headers are answered 431"""
    downstream_connections: int = 20_000
    requests: int = 65_536
    """circuit breaker of every cluster; Envoy's own default of 1024 refuses streams long before an engine is full"""
    heap_limit_bytes: int = 4 * 1024 * 1024 * 1024
    """near it Envoy gives memory back (90 %), then refuses new requests (95 %)"""
    trusted_hops: int = 0
    """proxies in front of us whose x-forwarded-for is believed"""

    connect_timeout_s: float = 2.0
    message_timeout_s: float = 60.0
    """extproc's time for one answer; requests may wait in its queue"""
    request_headers_timeout_s: float = 10.0
    request_timeout_s: float = 300.0
    """until a request is received whole"""
    stream_idle_timeout_s: float = 600.0
    """no byte in either direction. The only bound on an answer: generations take as long as they take"""
    downstream_idle_timeout_s: float = 3600.0
    upstream_idle_timeout_s: float = 4.0
    """below the 5 s after which vLLM and SGLang close an idle connection, or requests meet closing ones"""
    retries: int = 1
    """of a request that got no response byte, on another engine"""

    def __post_init__(self) -> None:
        assert self.concurrency >= 1, "Envoy needs a worker"
        assert self.body_limit_bytes >= self.connection_buffer_bytes
