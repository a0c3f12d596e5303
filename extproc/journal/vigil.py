"""Notices that somebody takes the state directory's files away, or cuts them short, while they are open.

SQLite does not: it goes on in a file that has no name any more, all looks well, and the next start finds empty counters
and gives every quota anew.
"""

from pathlib import Path


class Vigil:
    """Over the files that a process has open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._seen: dict[Path, tuple[int, int]] = {}
        self._size_bytes = path.stat().st_size
        self.gone()

    def gone(self) -> bool:
        """Whether one of them is not there any more, or another is in its place."""
        return self._changed(self._path) or self._changed(self._log)

    def shrunk(self) -> bool:
        """Whether the database is smaller than it was: after a VACUUM it may be, whole it is not otherwise."""
        size_bytes = self._path.stat().st_size
        if size_bytes < self._size_bytes:
            return True
        self._size_bytes = size_bytes
        return False

    def accept(self) -> None:
        """The present size is right."""
        self._size_bytes = self._path.stat().st_size

    def _changed(self, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return path in self._seen
        identity = found.st_dev, found.st_ino
        return self._seen.setdefault(path, identity) != identity
