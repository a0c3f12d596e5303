"""Bytes of one file from its source into its part, in pieces over several connections.

The first piece goes alone until its head is in: a server that answers with the whole file (200 instead of 206) has
no ranges, and then this one answer is the file. Pieces that fail go on where they stopped; a piece gives up after so
many tries without progress.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterable
from typing import Any

import aiohttp

from controller.models.errors import ChangedError, ContentError, LoadError, TransientError
from controller.models.http import Patience, reading
from controller.models.part import Part
from controller.models.progress import Progress
from controller.models.request import Settings
from controller.models.sources.source import RemoteFile, Source
from controller.models.threads import in_thread
from controller.models.tree import described

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PROGRESS_BYTES = 64 << 10  # less than this between two failures is no progress


class Transfer:
    """``gate`` bounds the connections of all transfers together."""

    def __init__(self, source: Source, settings: Settings, progress: Progress, gate: asyncio.Semaphore) -> None:
        self._source = source
        self._settings = settings
        self._progress = progress
        self._gate = gate

    async def fill(self, file: RemoteFile, part: Part) -> None:
        """Raises LoadError; what was written by then stays in the part."""
        part.counted = part.done_bytes
        self._progress.bytes_done += part.counted
        pieces = cut(part.missing, self._settings.piece_bytes)
        if not pieces:
            return
        # True: the server has ranges, and the other pieces may be asked for beside the first.
        ranges: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if len(pieces) == 1:
            ranges.set_result(False)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._piece(file, part, _Piece(*pieces[0]), ranges))
                if await ranges:
                    for start, last in pieces[1:]:
                        group.create_task(self._piece(file, part, _Piece(start, last), ranges))
        except BaseExceptionGroup as failures:
            raise foremost(failures) from None

    def restart(self, part: Part) -> None:
        self._progress.bytes_done -= part.counted
        part.counted = 0
        part.restart()

    async def _piece(self, file: RemoteFile, part: Part, piece: _Piece, ranges: asyncio.Future[bool]) -> None:
        patience = Patience(self._settings)
        while piece.at <= piece.last:
            failed: TransientError | None = None
            began, whole = piece.at, False
            async with self._gate:
                try:
                    # Asked for as a whole, a file that has but one piece needs no server with ranges.
                    response = await self._source.open(file, "" if piece.is_all(file.size) else piece.span)
                    self._check(file, piece, response)
                    if response.status == 200 and not piece.is_all(file.size):
                        if ranges.done() and ranges.result():
                            response.close()
                            raise TransientError("SourceUnavailable", "the source answers ranges for some pieces only")
                        whole = True
                        self.restart(part)
                        piece.at, piece.last = 0, file.size - 1
                    if not ranges.done():
                        ranges.set_result(not whole)
                    await self._body(part, piece, response)
                except ChangedError:
                    raise
                except TransientError as error:
                    failed = error
            if failed is not None:
                if not whole and piece.at - began >= _PROGRESS_BYTES:
                    patience.progressed()
                await patience.failed(failed)

    @staticmethod
    def _check(file: RemoteFile, piece: _Piece, response: aiohttp.ClientResponse) -> None:
        """The head promises what was asked for."""
        try:
            if response.headers.get("Content-Encoding", "identity") not in {"identity", ""}:
                raise ContentError(f"the source compresses {file.path}, and so breaks its size and hash")
            if response.status == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if match is None or int(match[1]) != piece.at or int(match[2]) > piece.last:
                    raise ContentError(f"the source answers for another range of {file.path} than was asked for")
                if match[3] not in {"*", str(file.size)}:
                    raise ChangedError(f"{file.path} has another size than the source's list says")
            elif response.content_length not in {None, file.size}:
                raise ChangedError(f"{file.path} has another size than the source's list says")
        except LoadError:
            response.close()
            raise

    async def _body(self, part: Part, piece: _Piece, response: aiohttp.ClientResponse) -> None:
        """Every byte that comes is written before any failure is told."""
        held: list[bytes] = []
        size = 0
        try:
            async with reading(response):
                # Chunk by chunk as they came: iter_any would copy them together first.
                async for chunk, _ in response.content.iter_chunks():
                    held.append(chunk)
                    size += len(chunk)
                    if piece.at + size > piece.last + 1:
                        held.clear()
                        size = 0
                        raise ContentError("the source sends more bytes than it promised")
                    if size >= self._settings.write_bytes:
                        batch, held, size = held, [], 0
                        await self._write(part, piece, batch)
        finally:
            if held:
                await self._write(part, piece, held)
        if piece.at <= piece.last:
            raise TransientError("Interrupted", f"{response.url.host} ended its answer too early")

    async def _write(self, part: Part, piece: _Piece, batch: list[bytes]) -> None:
        try:
            count = await in_thread(_nothing, part.write, piece.at, batch)
        except OSError as error:
            raise described(error, "writing a file") from None
        piece.at += count
        part.counted += count
        self._progress.bytes_done += count
        self._progress.loaded_bytes += count


class _Piece:
    """An inclusive stretch; ``at`` moves on as bytes are written."""

    __slots__ = ("at", "last")

    def __init__(self, at: int, last: int) -> None:
        self.at = at
        self.last = last

    @property
    def span(self) -> str:
        return f"bytes={self.at}-{self.last}"

    def is_all(self, size: int) -> bool:
        return self.at == 0 and self.last == size - 1


def cut(missing: list[tuple[int, int]], piece_bytes: int) -> list[tuple[int, int]]:
    return [
        (start, min(start + piece_bytes - 1, last))
        for first, last in missing
        for start in range(first, last + 1, piece_bytes)
    ]


async def together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; the first failure ends the others, and the foremost is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as failures:
        raise foremost(failures) from None


def _nothing() -> None:
    """One batch is short enough to be waited for."""


def foremost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure to tell of several: a lasting one first."""
    leaves: list[BaseException] = []
    open_groups: list[BaseException] = [group]
    while open_groups:
        one = open_groups.pop()
        if isinstance(one, BaseExceptionGroup):
            open_groups.extend(one.exceptions)
        else:
            leaves.append(one)
    return max(leaves, key=lambda one: one.exit_code if isinstance(one, LoadError) else 99)
