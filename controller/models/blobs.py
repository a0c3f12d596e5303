"""Where verified files lie before they have a name in the model's folder.

Shared: a folder of the volume, one file for each content, from which every model of the volume gets a hard link; one
download serves all, a model that is removed takes its links along, and a file without links is removed, oldest first,
when space is needed. Private: a folder inside the target, emptied as files get their names, for a volume that knows
no hard links or is not shared.

Files named by SHA-256 are the same whatever the source; anything weaker is keyed together with its source.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Sequence

from controller.models.part import JOURNAL, PART, read_journal
from controller.models.tree import OWN_PREFIX, Tree

PRIVATE_FOLDER = f"{OWN_PREFIX}parts"
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_KEY = re.compile(r"[a-z0-9]+-[0-9a-f]{64}")
_COPY_BYTES = 4 << 20


class Blobs:
    """``folder`` is closed by who opened it."""

    def __init__(self, folder: Tree, *, shared: bool) -> None:
        self.folder = folder
        self.shared = shared

    @classmethod
    def open(cls, root: str, target: str, cache: str) -> Blobs:
        """``cache`` is used where the volume can link from it into the target."""
        if cache:
            folder = Tree.open(root, cache)
            if _links(folder, root, target):
                return cls(folder, shared=True)
            folder.close()
        return cls(Tree.open(root, f"{target}/{PRIVATE_FOLDER}"), shared=False)

    def close(self) -> None:
        self.folder.close()

    def has(self, key: str, size: int) -> bool:
        found = self.folder.stat(key)
        return found is not None and found.st_size == size

    def written_bytes(self, key: str, size: int) -> int:
        return sum(last - first + 1 for first, last in read_journal(self.folder, key, size))

    def place(self, key: str, target: Tree, names: Sequence[str]) -> None:
        """Give the file these names; each appears whole, over whatever had it."""
        for name in names:
            with target.parent(name, create=True) as (fd, last):
                new = f"{OWN_PREFIX}new-{last}"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=fd)
                try:
                    os.link(key, new, src_dir_fd=self.folder.fd, dst_dir_fd=fd, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    if not self.shared and name == names[-1]:
                        os.replace(key, last, src_dir_fd=self.folder.fd, dst_dir_fd=fd)
                        continue
                    self._copy(key, fd, new)
                _replace(new, last, fd)
        if not self.shared:
            self.folder.remove(key)
        else:
            with contextlib.suppress(OSError):  # last used now; it may be another user's file
                os.utime(key, dir_fd=self.folder.fd)

    def adopt(self, key: str, target: Tree, name: str) -> None:
        """A verified file of the target becomes known to other models, where the volume allows."""
        if self.shared and self.folder.stat(key) is None:
            with contextlib.suppress(OSError), target.parent(name) as (fd, last):
                os.link(last, key, src_dir_fd=fd, dst_dir_fd=self.folder.fd, follow_symlinks=False)

    def _copy(self, key: str, fd: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            os.fdopen(self.folder.descriptor(key), "rb") as source,
            os.fdopen(os.open(name, flags, 0o444, dir_fd=fd), "wb") as copy,
        ):
            while block := source.read(_COPY_BYTES):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())

    def prune(self, wanted_bytes: int, keep: frozenset[str]) -> int:
        """Free so much of what no model uses, oldest first; bytes freed. Files being filled are left."""
        if not self.shared:
            return 0
        unused: list[tuple[float, str, int]] = []
        for name in self.folder.names():
            key = name.removesuffix(PART)
            if _KEY.fullmatch(key) is None or key in keep:
                continue
            found = self.folder.stat(name)
            if found is not None and found.st_nlink == 1 and stat.S_ISREG(found.st_mode):
                unused.append((found.st_mtime, name, found.st_blocks * 512))
        freed = 0
        for _, name, size in sorted(unused):
            if freed >= wanted_bytes:
                break
            if name.endswith(PART) and not self._abandoned(name):
                continue
            self.folder.remove(name)
            self.folder.remove(name.removesuffix(PART) + JOURNAL)
            freed += size
        return freed

    def _abandoned(self, name: str) -> bool:
        try:
            fd = self.folder.descriptor(name, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def clean(self, target: Tree) -> None:
        if not self.shared:
            target.remove_folder(PRIVATE_FOLDER)


def _replace(new: str, last: str, fd: int) -> None:
    try:
        os.replace(new, last, src_dir_fd=fd, dst_dir_fd=fd)
    except OSError:
        os.unlink(new, dir_fd=fd)
        raise
    # Renaming onto another link of the same file does nothing, and leaves both.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new, dir_fd=fd)


def _links(cache: Tree, root: str, target: str) -> bool:
    probe = f"{OWN_PREFIX}probe-{secrets.token_hex(8)}"  # every pod has the same process id
    folder = Tree.open(root, target)
    try:
        cache.write(probe, b"")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(probe, dir_fd=folder.fd)
        os.link(probe, probe, src_dir_fd=cache.fd, dst_dir_fd=folder.fd, follow_symlinks=False)
        os.unlink(probe, dir_fd=folder.fd)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe, dir_fd=cache.fd)
        folder.close()
    return True
