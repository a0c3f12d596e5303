"""A folder whose inside is reached name by name and never through a symbolic link.

File names come from outside (a repository's author) and the volume may be shared with others, who may plant links
between our check and our use; so every folder on the way is opened with O_NOFOLLOW, relative to the one before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from controller.models.errors import LastingError, NoSpaceError

OWN_PREFIX = ".arks-"  # names of the loader's own files
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checked_name(name: str) -> str:
    """The name of a file as a relative path; raises LastingError where it could lead or hide anywhere else."""
    parts = name.split("/")
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raw = b""
    if (
        not raw
        or len(raw) > 4000
        or any(part in ("", ".", "..") or len(part.encode()) > 240 for part in parts)
        or any(ord(letter) < 32 or ord(letter) == 127 or letter == "\\" for letter in name)
    ):
        raise LastingError("UnsafeFileName", f"the source lists a file name that is not safe: {name[:200]!r}")
    if any(part.startswith(OWN_PREFIX) for part in parts):
        raise LastingError("UnsafeFileName", f"the source lists a file name that the loader keeps for itself: {name!r}")
    return name


def described(error: OSError, doing: str) -> LastingError:
    """A failure of the volume in words; a full one is told apart."""
    if error.errno in _FULL:
        said = "the volume is full"
        if error.errno == errno.EFBIG:
            said = "the volume takes no file of this size"
        elif error.errno == errno.EDQUOT:
            said = "the volume's quota is used up"
        return NoSpaceError(f"{said} ({doing}); enlarge the storage or free space on it")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return LastingError(
            "UnsafeStorage", f"a link or a file is where a folder should be ({doing})", field="spec.storage"
        )
    name = errno.errorcode.get(error.errno or 0, "error")
    return LastingError(
        "StorageFailed", f"the volume refuses: {os.strerror(error.errno or 0)} ({name}, {doing})", field="spec.storage"
    )


class Tree:
    """An open folder; `close` it. Errors of the file system are OSError, see `described`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls, root: str, folder: str = "", *, create: bool = True) -> Tree:
        """``root`` may be reached through links; ``folder``, below it, may not."""
        if create:
            Path(root).mkdir(parents=True, exist_ok=True)
        tree = cls(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            return tree.below(folder, create=create)
        finally:
            tree.close()

    def below(self, folder: str, *, create: bool = True) -> Tree:
        fd = os.dup(self.fd)
        for part in folder.split("/"):
            if part in ("", "."):
                continue
            try:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                inner = os.open(part, _FOLDER, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return Tree(fd)

    def close(self) -> None:
        os.close(self.fd)

    @contextlib.contextmanager
    def parent(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """(descriptor of the folder that holds it, its last part)"""
        folder, _, last = name.rpartition("/")
        tree = self.below(folder, create=create)
        try:
            yield tree.fd, last
        finally:
            tree.close()

    def stat(self, name: str) -> os.stat_result | None:
        """Of a regular file; None where there is none."""
        try:
            with self.parent(name) as (fd, last):
                found = os.stat(last, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def descriptor(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        with self.parent(name, create=bool(flags & os.O_CREAT)) as (fd, last):
            return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=fd)

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """None where there is no such regular file, or a longer one."""
        found = self.stat(name)
        if found is None or found.st_size > limit_bytes:
            return None
        with os.fdopen(self.descriptor(name), "rb") as file:
            return file.read(limit_bytes + 1)

    def write(self, name: str, content: bytes, *, durable: bool = False) -> None:
        """All of it or nothing."""
        with self.parent(name, create=True) as (fd, last):
            new = f"{OWN_PREFIX}new-{last}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(new, flags, 0o644, dir_fd=fd), "wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(new, last, src_dir_fd=fd, dst_dir_fd=fd)
            if durable:
                os.fsync(fd)

    def remove(self, name: str) -> None:
        """A file; that it is not there is well. Folders that this empties go with it."""
        try:
            with self.parent(name) as (fd, last):
                os.unlink(last, dir_fd=fd)
        except (FileNotFoundError, IsADirectoryError):
            return
        folder = name.rpartition("/")[0]
        while folder:
            with self.parent(folder) as (fd, last):
                try:
                    os.rmdir(last, dir_fd=fd)
                except OSError:
                    return
            folder = folder.rpartition("/")[0]

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self.parent(name) as (fd, last):
            shutil.rmtree(last, dir_fd=fd)

    def names(self) -> list[str]:
        return os.listdir(self.fd)  # noqa: PTH208 - a path would be looked up anew, perhaps through a link

    def free_bytes(self) -> int:
        found = os.fstatvfs(self.fd)
        return found.f_bavail * found.f_frsize

    def sync(self) -> None:
        os.fsync(self.fd)
