"""Notices that somebody takes the state directory's files away, or cuts them short, while they are open.

SQLite does not: it goes on in a file that has no name any more, all looks well, and the next start finds empty counters
and gives every quota anew.
"""

from pathlib import Path

from extproc.journal.errors import StateUnreadable


class Vigil:
    """Over the files that a process has open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[Path, tuple[int, int]] = {}
        self._size_bytes = 0
        self.broken()

    def broken(self) -> bool:
        """Whether one of them is gone, or another is in its place. Raises StateUnreadable where one was cut short."""
        for path in (self._path, self._path.with_name(f"{self._path.name}-wal")):
            try:
                found = path.stat()
            except OSError:
                if path in self._seen:
                    return True
                continue
            if self._seen.setdefault(path, (found.st_dev, found.st_ino)) != (found.st_dev, found.st_ino):
                return True
            if path is self._path:
                # Without VACUUM a database never shrinks.
                if found.st_size < self._size_bytes:
                    raise StateUnreadable(f"{path} was cut short")
                self._size_bytes = found.st_size
        return False
