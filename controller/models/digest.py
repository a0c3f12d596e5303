"""What a source promises about a file's bytes, and whether they keep it.

``sha256``: LFS files of a hub, registry blobs, checksums of a store. ``git-sha1``: small files of a hub, which are
git blobs (the hash covers a header with the length). ``md5``: an S3 ETag of an object written in one part.
``md5-parts``: an ETag of one written in several, the MD5 of the parts' MD5s (with ``part_bytes`` of all but the
last). Without an algorithm only the size is promised.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    algorithm: str = ""
    value: str = ""
    part_bytes: int = 0

    @property
    def strong(self) -> bool:
        """Names its content whatever the source."""
        return self.algorithm == "sha256"

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}" if self.algorithm else ""


def digest_of(fd: int, size: int, promised: Digest, stopped: Callable[[], bool]) -> Digest | None:
    """The file's own digest, by the promise's algorithm; None when stopped. Blocks: run it in a thread."""
    if promised.algorithm == "md5-parts":
        return _of_parts(fd, size, promised.part_bytes, stopped)
    if promised.algorithm == "git-sha1":
        # Git's choice of hash; large files go by SHA-256.
        hasher = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    elif promised.algorithm == "md5":
        hasher = hashlib.md5(usedforsecurity=False)
    else:
        hasher = hashlib.sha256()
    offset = 0
    while offset < size:
        if stopped():
            return None
        block = os.pread(fd, min(_BLOCK, size - offset), offset)
        if not block:
            break
        hasher.update(block)
        offset += len(block)
    return Digest(promised.algorithm or "sha256", hasher.hexdigest())


def _of_parts(fd: int, size: int, part_bytes: int, stopped: Callable[[], bool]) -> Digest | None:
    parts: list[bytes] = []
    for start in range(0, size, part_bytes):
        end, offset = min(start + part_bytes, size), start
        hasher = hashlib.md5(usedforsecurity=False)
        while offset < end:
            if stopped():
                return None
            block = os.pread(fd, min(_BLOCK, end - offset), offset)
            if not block:
                break
            hasher.update(block)
            offset += len(block)
        parts.append(hasher.digest())
    whole = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return Digest("md5-parts", f"{whole}-{len(parts)}", part_bytes)
