"""Who we are to the API server: kubeconfig or the pod's service account, kept fresh.

Kubeconfig files are read by the official `kubernetes` package (merging, contexts, exec plugins, OIDC, client
certificates, token files); it is imported only then, in a thread, since it costs 20 MB and plugins block. A pod's
credentials are two files and two variables, read here. Life cycle: `access()` before every request answers from
memory, and in the background reads anew once a minute (tokens rotate in place) or shortly before a plugin's
credential expires; `renew()` reads at once, after a 401. The TLS context is kept as long as its files keep their
content, so that connections are reused.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import structlog
import yaml

from controller.kube.errors import CredentialsError

REREAD_S = 60.0
EXPIRY_MARGIN_S = 60.0
LOAD_TIMEOUT_S = 60.0
RENEW_PAUSE_S = 1.0
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """All that a request needs: address, headers, TLS. Its repr tells no secret."""

    base_url: str
    headers: Mapping[str, str] = field(repr=False)
    tls: ssl.SSLContext | bool = True
    proxy: str | None = None
    server_name: str | None = None
    valid_s: float = REREAD_S  # read anew after that long


Load = Callable[[bool], Access]


class Credentials:
    """Access that renews itself. `load(forced)` runs in a thread; `forced`: the server refused the last one."""

    def __init__(self, load: Load, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._load, self._clock = load, clock
        self._loading: asyncio.Task[None] | None = None
        self._access: Access | None = None
        self._loaded_at = 0.0

    async def access(self) -> Access:
        """The present access, never waiting once there was one; raises `CredentialsError` when there never was."""
        if self._access is None:
            await self._loaded(forced=False)
            assert self._access is not None
        elif self._clock() - self._loaded_at >= self._access.valid_s:
            self._start(forced=False)  # the old one is good for a while yet, or the server will say so
        return self._access

    async def renew(self, refused: Access) -> Access:
        """Another access than the one that the server refused, or the same when there is no other."""
        if self._access is refused and self._clock() - self._loaded_at >= RENEW_PAUSE_S:
            await self._loaded(forced=True)
        return self._access or refused

    async def close(self) -> None:
        """End a loading that still goes on."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
            self._loading = None

    async def _loaded(self, *, forced: bool) -> None:
        """Wait for a loading. A caller that gives up does not take it from the others."""
        await asyncio.shield(self._start(forced=forced))

    def _start(self, *, forced: bool) -> asyncio.Task[None]:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._reload(forced=forced), name="credentials")
            self._loading.add_done_callback(_note_failure)
        return self._loading

    async def _reload(self, *, forced: bool) -> None:
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                access = await asyncio.to_thread(self._load, forced)
        except CredentialsError:
            raise
        except TimeoutError as error:
            raise CredentialsError(f"credentials did not come within {LOAD_TIMEOUT_S:.0f} s") from error
        except Exception as error:
            # The package's own errors name a key or a file; a parser's may quote what it parsed.
            said = str(error) if type(error).__name__ == "ConfigException" else type(error).__name__
            raise CredentialsError(f"credentials cannot be read: {said}") from error
        finally:
            self._loaded_at = self._clock()  # also after a failure: the next try comes in its time
        # The same object stays while it says the same: `renew` tells by identity whether there is anything new.
        if self._access is None or _content(self._access) != _content(access):
            self._access = access


def _note_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.warning("credentials not renewed", error=str(task.exception()))


def _content(access: Access) -> tuple[object, ...]:
    return access.base_url, access.headers, access.tls, access.proxy, access.server_name


def detect(kubeconfig: str | None = None, context: str | None = None) -> Credentials:
    """The pod's own account inside a cluster, unless a kubeconfig is named; else the user's kubeconfig."""
    if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ and (SERVICE_ACCOUNT / "token").exists():
        return in_cluster()
    return from_kubeconfig(kubeconfig, context)


def in_cluster(folder: Path = SERVICE_ACCOUNT, environ: Mapping[str, str] = os.environ) -> Credentials:
    """A pod's service account: projected token and CA, which the kubelet replaces in place."""
    contexts = _TlsContexts()

    def load(_forced: bool) -> Access:
        try:
            host, port = environ["KUBERNETES_SERVICE_HOST"], environ["KUBERNETES_SERVICE_PORT"]
            token = (folder / "token").read_text().strip()
        except (KeyError, OSError) as error:
            raise CredentialsError(f"not inside a cluster: {error}") from error
        if not token:
            raise CredentialsError(f"{folder / 'token'} is empty")
        host = f"[{host}]" if ":" in host else host
        tls = contexts.get(str(folder / "ca.crt"))
        return Access(f"https://{host}:{port}", {"Authorization": f"Bearer {token}"}, tls)

    return Credentials(load)


def from_kubeconfig(path: str | None = None, context: str | None = None) -> Credentials:
    """A kubeconfig: the file named, else $KUBECONFIG, else ~/.kube/config."""
    return Credentials(_Kubeconfig(path, context).load)


class _Kubeconfig:
    """Reads the files anew each time, but runs a plugin only when its credential ends or was refused."""

    def __init__(self, path: str | None, context: str | None) -> None:
        self._path, self._context = path, context
        self._contexts = _TlsContexts()
        self._plugin: tuple[Access, dt.datetime | None] | None = None

    def load(self, forced: bool) -> Access:
        if self._plugin is not None and not forced:
            known, until = self._plugin
            if until is None or (until - dt.datetime.now(dt.UTC)).total_seconds() > EXPIRY_MARGIN_S:
                return known
        from kubernetes.config import kube_config  # noqa: PLC0415 - 20 MB that a pod never needs

        named = self._path or kube_config.KUBE_CONFIG_DEFAULT_LOCATION
        try:
            merged = _untyped(kube_config.KubeConfigMerger)(named)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark is not None else ""
            raise CredentialsError(f"the kubeconfig {named} is not YAML{line}") from error
        if merged.config is None:
            raise CredentialsError("no kubeconfig found")
        loader = _untyped(kube_config.KubeConfigLoader)(
            config_dict=merged.config,
            active_context=self._context,
            config_base_path=None,
            config_persister=merged.save_changes,
        )
        loaded = SimpleNamespace(api_key={})
        loader.load_and_set(loaded)
        found = vars(loaded)
        plugin = self._has_plugin(loader, merged.config)
        token = str(loaded.api_key.get("BearerToken", "")).removeprefix("Bearer").strip()
        if plugin and not (token or found.get("cert_file")):
            raise CredentialsError("the kubeconfig's credential plugin gave neither a token nor a certificate")
        if not found.get("host"):
            raise CredentialsError("the kubeconfig names no server")
        expiry: dt.datetime | None = getattr(loader, "expiry", None)
        access = self._access(found, expiry)
        self._plugin = (access, expiry) if plugin else None
        return access

    def _access(self, found: Mapping[str, Any], expiry: dt.datetime | None) -> Access:
        token = found["api_key"].get("BearerToken")
        tls: ssl.SSLContext | bool = False
        if found["host"].startswith("https"):
            files = (found.get("ssl_ca_cert"), found.get("cert_file"), found.get("key_file"))
            tls = self._contexts.get(*files, verify=found.get("verify_ssl", True))
        valid_s = REREAD_S
        if expiry is not None:
            left_s = (expiry - dt.datetime.now(dt.UTC)).total_seconds() - EXPIRY_MARGIN_S
            valid_s = min(REREAD_S, max(RENEW_PAUSE_S, left_s))
        return Access(
            found["host"].rstrip("/"),
            {"Authorization": token.strip()} if token else {},
            tls,
            found.get("proxy"),
            found.get("tls_server_name"),
            valid_s,
        )

    @staticmethod
    def _has_plugin(loader: Any, config: Any) -> bool:
        user = loader.current_context["context"].get("user")
        known = config["users"].get_with_name(user, safe=True) if user else None
        return known is not None and ("exec" in known["user"] or "auth-provider" in known["user"])


def _untyped(thing: Any) -> Any:
    """The package has no types: calls into it are unchecked, and marked so."""
    return thing


class _TlsContexts:
    """One TLS context per content of its files: a new one only when a certificate was rotated."""

    def __init__(self) -> None:
        self._known: tuple[bytes, ssl.SSLContext] | None = None

    def get(
        self, ca: str | None, cert: str | None = None, key: str | None = None, *, verify: bool = True
    ) -> ssl.SSLContext:
        digest = hashlib.sha256(bytes([verify]))
        for name in (ca, cert, key):
            digest.update(Path(name).read_bytes() if name else b"-")
        if self._known is None or self._known[0] != digest.digest():
            context = ssl.create_default_context(cafile=ca)
            # Many clusters' own CAs lack the key identifiers that newer Pythons insist on.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if not verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if cert:
                context.load_cert_chain(cert, key)
            self._known = (digest.digest(), context)
        return self._known[1]
