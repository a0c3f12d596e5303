"""What one extproc process is told at its start. Built by the command line, read by `extproc.app.run`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

TransportName: TypeAlias = Literal["h2", "grpc_aio"]
OnJournalFailure: TypeAlias = Literal["refuse", "serve"]

BODY_LIMIT_BYTES = 50 * 1024 * 1024
"""the largest request body Envoy buffers for us; larger ones are answered 413 by Envoy"""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Server certificate for a TCP listener; with `client_ca` every peer must show a certificate signed by it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ExtprocSettings:
    listen: str
    """HOST:PORT (port 0: any free one) or unix:PATH"""
    policy_dir: Path | None
    """watched folder of arks.ai/v1 YAML; None: `policy_stream` says where policy comes from"""
    state_dir: Path
    """ledger and limit journal; made where absent"""
    admin: str
    """HOST:PORT of /healthz, /readyz, /metrics"""
    engines: tuple[str, ...] = ()
    """ip:port, IPv6 bracketed: they serve every endpoint that names no routeConfigs"""
    transport: TransportName = "h2"
    tls: TlsSettings | None = None
    on_journal_failure: OnJournalFailure = "refuse"
    """what happens to new requests while the state folder cannot be written"""
    retain_days: int | None = None
    """usage rows older than this are deleted; None keeps them all"""
    drain_timeout_s: float = 30.0
    """after SIGTERM, how long requests under way are waited for; then they go on without this process"""
    eds_file: Path | None = None
    """where to keep Envoy's view of the engines (`apis.eds`); None: some other control plane tells Envoy"""
    message_limit_bytes: int = BODY_LIMIT_BYTES + 1024 * 1024
    """largest gRPC message: one buffered body and its frame"""
    policy_stream: str | None = None
    """the controller's policy stream instead of a folder: unix:PATH or HOST:PORT"""
    metrics_per_token: bool = False
    """label `user` (the token's name) on the gateway_* metrics: one set of series per token, so off by default"""
