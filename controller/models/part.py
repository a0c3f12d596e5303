"""A file that is being filled, and survives the death of who fills it.

Beside the part lies its journal: a first line that says for which content the part is (size and key), then one line
``first last`` for every stretch of bytes written. A line is written after its bytes, so what a journal claims was
handed to the kernel; a killed process loses only what it had not yet written. A node that loses power may lose more
than the journal knows: then the digest differs, and the part starts over.

The part's flock makes one process fill it; whoever waits finds the finished file when the lock is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import Sequence

from controller.models.tree import Tree

PART, JOURNAL = ".part", ".journal"
_STRETCH = re.compile(rb"(\d{1,18}) (\d{1,18})\n")
_BUFFERS = 512  # below IOV_MAX


class Part:
    """Made by `claim`. ``missing`` holds inclusive stretches (first, last)."""

    def __init__(self, store: Tree, key: str, size: int, fd: int) -> None:
        self.key = key
        self.size = size
        self.fd = fd
        self._store = store
        self._journal = -1
        self.missing: list[tuple[int, int]] = []
        self.resumed = False
        self.counted = 0  # bytes of it that the progress shows
        self._open()

    @property
    def done_bytes(self) -> int:
        return self.size - sum(last - first + 1 for first, last in self.missing)

    def _head(self) -> bytes:
        return b"%d %s\n" % (self.size, self.key.encode())

    def _open(self) -> None:
        written = read_journal(self._store, self.key, self.size)
        self.resumed = bool(written)
        if not written:
            self.restart()
            return
        self._journal = self._store.descriptor(self.key + JOURNAL, os.O_WRONLY | os.O_APPEND)
        # A line that was cut by the death of its writer must not run into the next one.
        os.write(self._journal, b"\n")
        self.missing = gaps(written, self.size)

    def restart(self) -> None:
        """Nothing of it counts any more."""
        if self._journal >= 0:
            os.close(self._journal)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC
        self._journal = self._store.descriptor(self.key + JOURNAL, flags)
        os.write(self._journal, self._head())
        os.ftruncate(self.fd, 0)
        self.missing = gaps([], self.size)
        self.resumed = False

    def write(self, offset: int, buffers: Sequence[bytes]) -> int:
        """Bytes written. Blocks for as long as the volume does; OSError where it refuses."""
        at = offset
        for start in range(0, len(buffers), _BUFFERS):
            batch = list(buffers[start : start + _BUFFERS])
            while batch:
                count = os.pwritev(self.fd, batch, at)
                at += count
                while batch and count >= len(batch[0]):
                    count -= len(batch.pop(0))
                if batch and count:
                    batch[0] = batch[0][count:]
        if at > offset:
            os.write(self._journal, b"%d %d\n" % (offset, at - 1))
        return at - offset

    def finish(self) -> None:
        """The part becomes the file named by its key: its bytes first, then its name."""
        os.ftruncate(self.fd, self.size)
        os.fchmod(self.fd, 0o444)
        os.fsync(self.fd)
        os.replace(self.key + PART, self.key, src_dir_fd=self._store.fd, dst_dir_fd=self._store.fd)
        self._store.remove(self.key + JOURNAL)

    def close(self) -> None:
        os.close(self.fd)
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


async def claim(store: Tree, key: str, size: int, poll_s: float) -> Part | None:
    """The part of this content, ours alone; None where the finished file is there (another one may just have made it).

    Waits while another process fills it. OSError as of `Tree`.
    """
    while True:
        found = store.stat(key)
        if found is not None and found.st_size == size:
            return None
        fd = store.descriptor(key + PART, os.O_RDWR | os.O_CREAT)
        try:
            with contextlib.suppress(BlockingIOError):
                _lock(fd)
                # Who held the lock before may have renamed or removed what we opened.
                there = store.stat(key + PART)
                mine = os.fstat(fd)
                if there is not None and (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev):
                    return Part(store, key, size, fd)
                os.close(fd)
                continue
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        await asyncio.sleep(poll_s)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # Without locks two may fill one part: with the same bytes at the same places, as the key names the content.
        return


def read_journal(store: Tree, key: str, size: int) -> list[tuple[int, int]]:
    """Stretches that are written, merged and in order; none where the journal is another content's."""
    content = store.read(key + JOURNAL, 1 << 30) or b""
    part = store.stat(key + PART)
    if part is None or not content.startswith(b"%d %s\n" % (size, key.encode())):
        return []
    stretches: list[tuple[int, int]] = []
    for line in content.splitlines(keepends=True)[1:]:
        match = _STRETCH.fullmatch(line)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        if first <= last < min(size, part.st_size):
            stretches.append((first, last))
    return merged(stretches)


def merged(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    whole: list[tuple[int, int]] = []
    for first, last in sorted(stretches):
        if whole and first <= whole[-1][1] + 1:
            whole[-1] = (whole[-1][0], max(whole[-1][1], last))
        else:
            whole.append((first, last))
    return whole


def gaps(written: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What ``written`` (merged) leaves of ``0 … size - 1``."""
    missing: list[tuple[int, int]] = []
    at = 0
    for first, last in written:
        if first > at:
            missing.append((at, first - 1))
        at = last + 1
    if at < size:
        missing.append((at, size - 1))
    return missing
