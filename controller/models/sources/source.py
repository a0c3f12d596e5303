"""What a source of files can do: list them at one revision, and say how one's bytes are asked for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import aiohttp
import msgspec

from controller.models.digest import Digest
from controller.models.errors import LastingError, TransientError
from controller.models.http import Answer, Http, HttpRequest, RefusedError, persistently

T = TypeVar("T")
Unpack: TypeAlias = Literal["", "tar", "tar+gzip"]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """``identity`` names the content at this source where the digest is weak; ``address`` is for the source itself.
    With ``unpack`` the file is an archive, and ``path`` only names it.
    """

    path: str
    size: int
    digest: Digest = field(default_factory=Digest)
    identity: str = ""
    address: str = ""
    unpack: Unpack = ""

    @property
    def key(self) -> str:
        """Equal for equal content."""
        if self.digest.strong:
            return f"sha256-{self.digest.value}"
        told = "\0".join((self.identity, str(self.size), str(self.digest)))
        return "source-" + hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Listing:
    """``revision`` stands for exactly these files: a commit, a digest."""

    revision: str
    files: tuple[RemoteFile, ...]


class Source(ABC):
    """``spec`` is the source's path in an ArksModel, for messages."""

    spec: str

    def __init__(self, http: Http) -> None:
        self.http = http

    @abstractmethod
    async def listing(self, wanted: Callable[[str], bool]) -> Listing:
        """Raises LoadError. A file that is not wanted costs no request of its own."""

    @abstractmethod
    async def request(self, file: RemoteFile, span: str) -> HttpRequest:
        """``span`` is the Range header's value, or empty for the whole file."""

    @abstractmethod
    def refusal(self, answer: Answer) -> LastingError:
        """Which field is at fault, by a 4xx answer."""

    async def renew(self, answer: Answer) -> bool:
        """After 401: credentials were made anew, and the request is worth a second try."""
        return False

    async def open(self, file: RemoteFile, span: str) -> aiohttp.ClientResponse:
        """Raises LoadError."""
        return await self._asked(lambda: self.request(file, span), self.http.send)

    async def document(self, make: Callable[[], Awaitable[HttpRequest]]) -> tuple[bytes, Mapping[str, str]]:
        """A small answer, tried patiently. ``make`` is called for each try, as a signature has its time."""
        return await persistently(self.http.settings, lambda: self._asked(make, self.http.document))

    async def json(self, url: str, headers: Mapping[str, str]) -> tuple[Any, Mapping[str, str]]:
        async def make() -> HttpRequest:
            return HttpRequest(url, headers)

        body, answered = await self.document(make)
        return decoded(body), answered

    async def _asked(
        self, make: Callable[[], Awaitable[HttpRequest]], send: Callable[[HttpRequest], Awaitable[T]]
    ) -> T:
        try:
            return await send(await make())
        except RefusedError as refused:
            if not await self.renew(refused.answer):
                raise self.refusal(refused.answer) from None
        try:
            return await send(await make())
        except RefusedError as refused:
            raise self.refusal(refused.answer) from None


def decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # A portal's or a mirror's error page, answered with 200.
        raise TransientError("UnusableAnswer", "the source does not answer with JSON") from None


def listing_revision(files: tuple[RemoteFile, ...]) -> str:
    """A name for a list of files at a source that has none."""
    told = "\n".join(sorted(f"{file.path}\0{file.size}\0{file.key}" for file in files))
    return "listing-" + hashlib.sha256(told.encode()).hexdigest()[:40]
