"""What the controller is told when it starts."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from controller.kube.client import SILENCE_S
from controller.kube.credentials import SERVICE_ACCOUNT
from controller.reconcile.context import MODEL_RETRY_S
from controller.reconcile.downloads import PROGRESS_S
from controller.reconcile.registry import WORKERS

DEFAULT_NAMESPACE: Final = "arks-system"
LEASE_NAME: Final = "arks-controller"


def own_namespace(environ: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT) -> str:
    """The pod's namespace, else the one that the manifests install into."""
    if environ.get("POD_NAMESPACE"):
        return environ["POD_NAMESPACE"]
    try:
        return (folder / "namespace").read_text().strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


def identity(environ: Mapping[str, str] = os.environ) -> str:
    """Another one for each start: a predecessor under the same name must not pass for us."""
    return f"{environ.get('POD_NAME') or socket.gethostname()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """`environment` overrides default images (`ARKS_RUNTIME_DEFAULT_VLLM_IMAGE` and its kin)."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str = field(default_factory=own_namespace)
    """where the Lease is"""
    lease_name: str = LEASE_NAME
    identity: str = field(default_factory=identity)
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    """of /healthz, /readyz and /metrics; 0 is any free one"""
    policy_stream: str | None = None
    """unix:PATH, or HOST:PORT on loopback: where extproc follows the policy; None publishes nothing"""
    workers: int = WORKERS
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    model_retry_s: float = MODEL_RETRY_S
    model_progress_s: float = PROGRESS_S
    lease_s: float = 15.0
    renew_s: float = 10.0
    retry_s: float = 2.0
    discovery_s: float = 10.0
    watch_silence_s: float = SILENCE_S
