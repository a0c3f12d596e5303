"""Where a server end listens: HOST:PORT or unix:PATH, and with which certificates.

A Unix socket is its owner's alone (mode 0600) before anybody can connect. A socket file that nobody listens on any more
is replaced; one that somebody does listen on is an error, as a port in use is.
"""

import errno
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

_BACKLOG: Final = 1024


class CertificateFiles(Protocol):
    @property
    def certificate(self) -> Path: ...
    @property
    def key(self) -> Path: ...
    @property
    def client_ca(self) -> Path | None: ...


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a listener; with `client_ca` every peer must show a certificate signed by it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


def tls_context(files: CertificateFiles) -> ssl.SSLContext:
    """A server's context that speaks HTTP/2 only (RFC 9113 9.2 asks for TLS 1.2 at least)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def unix_path(address: str) -> Path | None:
    """PATH of unix:PATH, None for HOST:PORT."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def host_and_port(address: str) -> tuple[str, int]:
    """Raises ValueError for anything but HOST:PORT, IPv6 hosts in brackets."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"not HOST:PORT or unix:PATH: {address}")
    return host.strip("[]"), int(port)


def address_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def clear_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on. Raises OSError (EADDRINUSE) where somebody does."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"not a socket: {path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # a full backlog, say: somebody is there
    raise OSError(errno.EADDRINUSE, f"another process listens on {path}")


def listen(address: str, *, reuse_port: bool = False) -> socket.socket:
    """A bound, listening, non-blocking socket."""
    path = unix_path(address)
    if path is not None:
        clear_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: object = str(path)
    else:
        host, port = host_and_port(address)
        family, _, _, _, target = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if path is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Finds out that a peer vanished without a word, on connections that may be idle for long.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)  # type: ignore[arg-type]
        if path is not None:
            path.chmod(0o600)  # between bind and listen nobody can connect
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class SocketFile:
    """The file of a Unix socket, to be removed at the end unless a successor has put its own there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def remove(self) -> None:
        if self._identity is not None and self._look() == self._identity:
            self._path.unlink(missing_ok=True)
        self._identity = None
