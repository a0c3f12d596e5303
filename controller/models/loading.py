"""One load from its request to its ready marker; the package's docstring tells the order of things.

Nothing that is in place is loaded again: a file of the target that keeps the source's promise stays (weights that
another tool downloaded are adopted so), a file that another model of the volume has is linked, a part goes on where
it stopped. Files of an earlier request that the new one lacks are removed; files that no request brought are not ours.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence

from controller.models.blobs import Blobs
from controller.models.digest import digest_of
from controller.models.errors import ChangedError, ContentError, LoadError
from controller.models.existing import verified
from controller.models.http import Http
from controller.models.lock import held
from controller.models.marker import (
    MARKER_FILE,
    NAMES_FILE,
    Marker,
    PlacedFile,
    read_marker,
    read_names,
    whole,
    write_marker,
    write_names,
)
from controller.models.part import Part, claim
from controller.models.patterns import wanted
from controller.models.plan import Plan, make_room, planned
from controller.models.progress import Progress
from controller.models.request import HostPath, LoadRequest, Pvc, Settings, placed
from controller.models.sources.opening import opened
from controller.models.sources.source import RemoteFile, Source
from controller.models.threads import in_thread
from controller.models.transfer import Transfer, together
from controller.models.tree import Tree, described
from controller.models.unpack import unpacked

_LISTINGS = 3  # a source that changes faster than this is not to be loaded
_CHECKS_AT_ONCE = 4


class Loading:
    """Run once. Raises LoadError; cancelled, it keeps what is there and ends within one block of bytes."""

    def __init__(
        self, request: LoadRequest, settings: Settings, environment: Mapping[str, str], progress: Progress
    ) -> None:
        self._request = request
        self._settings = settings
        self._environment = environment
        self._progress = progress
        self._stopped = threading.Event()

    async def run(self) -> Marker | None:
        """The marker; None for weights that are only looked at."""
        try:
            return await self._run()
        except OSError as error:
            raise described(error, "in the model's folder") from None

    async def _run(self) -> Marker | None:
        source = self._request.source
        if isinstance(source, Pvc | HostPath):
            name = "spec.source.pvc" if isinstance(source, Pvc) else "spec.source.hostPath"
            self._progress.tell("checking")
            stop, stopped = self._stopped.set, self._stopped.is_set
            found = await in_thread(stop, verified, self._request.path, name, stopped)
            self._counted(found.size, found.files)
            return None
        root, folder, cache = placed(self._request, self._settings)
        target = Tree.open(root, folder)
        try:
            if (marker := self._ready(target)) is not None:
                return marker
            async with held(
                target,
                poll_s=self._settings.lock_poll_s,
                silence_s=self._settings.lock_silence_s,
                waiting=self._waiting,
            ):
                if (marker := self._ready(target)) is not None:
                    return marker
                self._progress.folder = target
                blobs = Blobs.open(root, folder, cache)
                try:
                    marker = await self._fill(target, blobs)
                    self._progress.tell("ready")
                    return marker
                except OSError as error:
                    told = described(error, "in the model's folder")
                    self._progress.fail(told)
                    raise told from None
                except (LoadError, asyncio.CancelledError) as error:
                    self._progress.fail(error)
                    raise
                finally:
                    blobs.close()
        finally:
            self._progress.folder = None
            target.close()

    def _waiting(self) -> None:
        self._progress.tell("waiting", "another loader fills this folder")

    def _ready(self, target: Tree) -> Marker | None:
        marker = read_marker(target)
        if marker is None or marker.fingerprint != self._request.fingerprint() or not whole(target, marker):
            return None
        self._progress.revision = marker.revision
        self._counted(marker.total_bytes, len(marker.files))
        return marker

    def _counted(self, size: int, files: int) -> None:
        progress = self._progress
        progress.bytes_done = progress.bytes_total = size
        progress.files_done = progress.files_total = files

    async def _fill(self, target: Tree, blobs: Blobs) -> Marker:
        before = read_marker(target)
        brought = read_names(target) | ({file.path for file in before.files} if before is not None else set())
        write_names(target, brought)
        target.remove(MARKER_FILE)
        async with Http(self._settings) as http:
            source = opened(http, self._request, self._environment)
            for attempt in range(1, _LISTINGS + 1):
                self._stopped = threading.Event()
                try:
                    marker = await self._once(source, target, blobs)
                    break
                except ChangedError:
                    if attempt == _LISTINGS:
                        raise
        self._progress.tell("finishing")
        for name in read_names(target) - {file.path for file in marker.files}:
            target.remove(name)
        blobs.clean(target)
        target.sync()
        write_marker(target, marker)
        target.remove(NAMES_FILE)
        return marker

    async def _once(self, source: Source, target: Tree, blobs: Blobs) -> Marker:
        progress, settings = self._progress, self._settings
        progress.tell("listing")
        listing = await source.listing(self._wanted)
        plan = planned(listing)
        progress.revision = listing.revision
        progress.bytes_total = sum(file.size for names in plan.groups.values() for file in names[:1])
        progress.bytes_done = progress.files_done = 0
        progress.files_total = sum(len(names) for names in plan.groups.values())
        progress.tell("checking")
        await self._keep(plan, target, blobs)
        make_room(plan, blobs, settings.margin_bytes)
        write_names(target, read_names(target) | {file.path for file in listing.files if not file.unpack})
        progress.tell("loading")
        gate = asyncio.Semaphore(settings.connections)
        transfer = Transfer(source, settings, progress, gate)
        files_gate = asyncio.Semaphore(settings.files_at_once)
        loaded_before = progress.loaded_bytes
        extracted: list[PlacedFile] = []
        await together(
            self._file(key, files, transfer, files_gate, target, blobs, extracted)
            for key, files in plan.missing.items()
        )
        if plan.missing and progress.loaded_bytes == loaded_before:
            await _may_read(source, plan)
        placed_files = [PlacedFile(file.path, file.size, str(file.digest)) for file in listing.files if not file.unpack]
        return Marker(
            fingerprint=self._request.fingerprint(),
            model=self._request.model,
            source=self._request.kind,
            revision=listing.revision,
            files=list({file.path: file for file in (*placed_files, *extracted)}.values()),
        )

    def _wanted(self, path: str) -> bool:
        return wanted(path, self._request.source.include, self._request.source.exclude)

    async def _keep(self, plan: Plan, target: Tree, blobs: Blobs) -> None:
        """What the target has already is verified and kept; the rest is missing."""
        gate = asyncio.Semaphore(_CHECKS_AT_ONCE)

        async def check(key: str, files: list[RemoteFile]) -> None:
            missing = []
            for file in files:
                async with gate:
                    if file.unpack or not await self._kept(key, file, target, blobs):
                        missing.append(file)
            if missing:
                plan.missing[key] = missing
            else:
                self._progress.bytes_done += files[0].size
            self._progress.files_done += len(files) - len(missing)

        await together(check(key, files) for key, files in plan.groups.items())

    async def _kept(self, key: str, file: RemoteFile, target: Tree, blobs: Blobs) -> bool:
        found = target.stat(file.path)
        if found is None or found.st_size != file.size:
            return False
        known = blobs.folder.stat(key)
        if known is not None and (known.st_ino, known.st_dev) == (found.st_ino, found.st_dev):
            return True
        # Without a digest, another file of the same size would pass for this one.
        if not file.digest.algorithm:
            return False
        fd = target.descriptor(file.path)
        try:
            kept = await self._keeps_promise(fd, file)
        finally:
            os.close(fd)
        if kept:
            blobs.adopt(key, target, file.path)
        return kept

    async def _keeps_promise(self, fd: int, file: RemoteFile) -> bool:
        if not file.digest.algorithm:
            return os.fstat(fd).st_size == file.size
        found = await in_thread(self._stopped.set, digest_of, fd, file.size, file.digest, self._stopped.is_set)
        return found is not None and found.value == file.digest.value

    async def _file(
        self,
        key: str,
        files: list[RemoteFile],
        transfer: Transfer,
        gate: asyncio.Semaphore,
        target: Tree,
        blobs: Blobs,
        extracted: list[PlacedFile],
    ) -> None:
        file = files[0]
        async with gate:
            part = await claim(blobs.folder, key, file.size, self._settings.lock_poll_s)
            if part is None:
                self._progress.bytes_done += file.size
            else:
                try:
                    await self._loaded(file, part, transfer)
                finally:
                    part.close()
            if file.unpack:
                extracted.extend(await self._extracted(key, file, target, blobs))
                if not blobs.shared:
                    blobs.folder.remove(key)
            else:
                await in_thread(self._stopped.set, blobs.place, key, target, [one.path for one in files])
            self._progress.files_done += len(files)

    async def _loaded(self, file: RemoteFile, part: Part, transfer: Transfer) -> None:
        for last_try in (False, True):
            await transfer.fill(file, part)
            if await self._keeps_promise(part.fd, file):
                break
            transfer.restart(part)
            if last_try:
                told = f"what the source sends for {file.path} is not what it promises ({file.digest.algorithm})"
                raise ContentError(told)
        await in_thread(self._stopped.set, part.finish)

    async def _extracted(self, key: str, file: RemoteFile, target: Tree, blobs: Blobs) -> Sequence[PlacedFile]:
        fd = blobs.folder.descriptor(key)

        try:
            stop, stopped = self._stopped.set, self._stopped.is_set
            return await in_thread(stop, unpacked, fd, file.unpack, target, self._wanted, stopped)
        finally:
            os.close(fd)


async def _may_read(source: Source, plan: Plan) -> None:
    """One byte is asked for where all came from the volume's cache: who has the list need not have the right to read
    (hubs show lists of restricted repositories to all).
    """
    file = max((files[0] for files in plan.missing.values()), key=lambda one: one.size)
    if file.size:
        (await source.open(file, "bytes=0-0")).close()
