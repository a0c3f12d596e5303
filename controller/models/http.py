"""Requests to sources: proxies, redirects without leaking credentials, and failures sorted by what helps.

Failures that pass (no answer, 408, 425, 429, 5xx) are TransientError, with the server's Retry-After, which holds back
every request to that host. An answer that refuses for good is RefusedError: the source knows which field it is about.
A refusal by another host than the one asked (a hub redirects to storage by signed URLs that expire) is transient: the
next try gets a new URL.

Proxies come from HTTP_PROXY, HTTPS_PROXY and NO_PROXY; trusted authorities from SSL_CERT_FILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Self
from urllib.parse import quote

import aiohttp
from yarl import URL

from controller.kube.backoff import pause_s
from controller.models.errors import ChangedError, LastingError, LoadError, TransientError
from controller.models.request import Settings

RETRY_AFTER_MAX_S = 300.0
_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 6
_PASSING = (408, 425, 429)
_DOCUMENT_LIMIT_BYTES = 256 << 20
_REFUSAL_BYTES, _REFUSAL_S = 8192, 2.0
_ACROSS = ("range", "accept", "accept-encoding", "user-agent")
_AGENT = "arks-models"


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """``url`` is sent as it is, already encoded: a signature may cover its exact form."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: bytes | None = None
    follow: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a refusal tells. ``text`` is how its body begins: for a source's own codes, never to be shown."""

    status: int
    host: str
    headers: Mapping[str, str]
    text: str = ""


class RefusedError(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.host} answered {answer.status}")
        self.answer = answer


class Http:
    """One session; close it with `async with`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._not_before: dict[str, float] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.settings.connect_timeout_s,
                sock_read=self.settings.silence_timeout_s,
            ),
            # Stored bytes are wanted as they are stored; sizes and hashes speak of those.
            auto_decompress=False,
            headers={"User-Agent": _AGENT, "Accept-Encoding": "identity"},
            trust_env=True,
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, request: HttpRequest) -> aiohttp.ClientResponse:
        """The answer's head, 2xx; the caller reads and closes it. Raises LoadError, RefusedError."""
        assert self._session is not None
        url = asked = _url(request.url)
        headers = dict(request.headers)
        for _ in range(_HOPS):
            host = _host(url)
            await self._held_back(host)
            try:
                response = await self._session.request(
                    request.method, url, headers=headers, data=request.body, allow_redirects=False
                )
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                raise failure(error, host) from None
            if response.status in _REDIRECTS and request.follow:
                response.close()
                url = _next(url, response.headers.get("Location", ""))
                if url.origin() != asked.origin():
                    headers = {name: value for name, value in headers.items() if name.lower() in _ACROSS}
                continue
            if response.status < 300:
                return response
            text = await _beginning(response)
            response.close()
            raise self._refusal(response, host, text, redirected=url.origin() != asked.origin())
        raise TransientError("TooManyRedirects", f"{_host(asked)} redirects in circles")

    async def document(self, request: HttpRequest) -> tuple[bytes, Mapping[str, str]]:
        """A whole small answer, one try."""
        response = await self.send(request)
        host = _host(response.url)
        try:
            chunks: list[bytes] = []
            size = 0
            async for chunk in response.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                if size > _DOCUMENT_LIMIT_BYTES:
                    raise LastingError("UnusableAnswer", f"{host} answers with more than any list of files is long")
            return b"".join(chunks), response.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise failure(error, host) from None
        finally:
            response.close()

    async def _held_back(self, host: str) -> None:
        wait_s = self._not_before.get(host, 0.0) - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def _refusal(self, response: aiohttp.ClientResponse, host: str, text: str, *, redirected: bool) -> Exception:
        status = response.status
        if status in (412, 416):
            return ChangedError(f"a file on {host} changed while it was loaded ({status})")
        if status == 407:
            return _proxy_refused(host)
        if status in _PASSING or status >= 500 or redirected:
            wait_s = retry_after_s(response.headers.get("Retry-After", ""))
            if wait_s:
                self._not_before[host] = max(self._not_before.get(host, 0.0), time.monotonic() + wait_s)
            told = {429: "TooManyRequests"}.get(status, "SourceUnavailable")
            return TransientError(told, f"{host} answers {status}")
        return RefusedError(Answer(status, host, response.headers, text))


class Patience:
    """How often one piece of work is tried: `failed` waits, or raises when it is too often without progress."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    async def failed(self, error: TransientError) -> None:
        self._failures += 1
        if self._failures > self._settings.retries:
            raise error
        first_s, longest_s = self._settings.backoff_first_s, self._settings.backoff_longest_s
        await asyncio.sleep(pause_s(self._failures, first_s, longest_s))


async def persistently(
    settings: Settings, ask: Callable[[], Awaitable[tuple[bytes, Mapping[str, str]]]]
) -> tuple[bytes, Mapping[str, str]]:
    patience = Patience(settings)
    while True:
        try:
            return await ask()
        except TransientError as error:
            await patience.failed(error)


@contextlib.asynccontextmanager
async def reading(response: aiohttp.ClientResponse) -> AsyncIterator[None]:
    """Failures inside are this host's; the connection is kept only when the body was read to its end."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, aiohttp.ClientError | TimeoutError | ConnectionError):
            raise  # the volume's
        raise failure(error, _host(response.url)) from None
    finally:
        response.close()


async def _beginning(response: aiohttp.ClientResponse) -> str:
    """As much of a refusal's body as comes at once; a server that withholds it has still refused."""
    told = b""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with asyncio.timeout(_REFUSAL_S):
            while len(told) < _REFUSAL_BYTES and (chunk := await response.content.read(_REFUSAL_BYTES - len(told))):
                told += chunk
    return told.decode(errors="replace")


def failure(error: Exception, host: str) -> LoadError:
    """What went wrong on the way, without the URL that aiohttp's own messages hold."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return LastingError(
            "CertificateRefused",
            f"the certificate of {host} is not trusted; mount its authority and name the file in SSL_CERT_FILE",
            field="spec.instanceSpec.env",
        )
    if isinstance(error, aiohttp.ClientHttpProxyError):
        if error.status in (401, 403, 407):
            return _proxy_refused(host)
        return TransientError("Unreachable", f"the proxy answers {error.status} for {host}")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return TransientError("Unreachable", f"the proxy for {host} cannot be reached")
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return LastingError("InvalidRequest", "the source's address is not a URL")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return TransientError("Unreachable", f"the name {host} is not known to the resolver")
    if isinstance(error, TimeoutError):
        return TransientError("Unreachable", f"{host} is silent")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransientError("Unreachable", f"{host} cannot be reached ({type(error.os_error).__name__})")
    return TransientError("Interrupted", f"the connection to {host} broke ({type(error).__name__})")


def retry_after_s(value: str) -> float:
    """Seconds or a date, as RFC 9110 has it; 0 where there is none, never longer than a few minutes."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S) if seconds == seconds else 0.0  # noqa: PLR0124 - not a number


def _next(url: URL, location: str) -> URL:
    try:
        there = url.join(_url(location))
        origin = there.origin()
    except ValueError:
        raise TransientError("SourceUnavailable", f"{_host(url)} redirects to nowhere") from None
    if url.scheme == "https" and origin.scheme != "https":
        raise LastingError("UnsafeRedirect", f"{_host(url)} redirects from https to {origin.scheme}")
    return there


def _url(text: str) -> URL:
    """As it is, except for what no request line may hold (spaces, line ends, letters beyond ASCII)."""
    legal = quote(text.encode("utf-8", "surrogateescape"), safe="%/:=&?~#+!$,;'@()*[]-._")
    try:
        return URL(legal, encoded=True)
    except ValueError:
        raise LastingError("InvalidRequest", "the source's address is not a URL", field="spec.source") from None


def _host(url: URL) -> str:
    return url.host or "the source"


def _proxy_refused(host: str) -> LastingError:
    return LastingError("ProxyRefused", f"the proxy does not let requests to {host} through", field="spec.source")
