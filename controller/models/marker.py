"""The ready marker: what the folder holds, written last and atomically; a folder without one is not complete.

It names the request it answers (by fingerprint), the revision, and every file with size and digest. Before anything
in a folder is changed its marker is removed, so no reader ever sees a marker beside half of another model.

While there is no marker, a list of names tells which files are the loader's: those of an earlier request, or of one
that was killed, go when the new request does not want them. Engines read every shard that they find.
"""

from __future__ import annotations

import msgspec

from controller.models.errors import LastingError
from controller.models.tree import Tree, checked_name

MARKER_FILE = ".arks-ready.json"
NAMES_FILE = ".arks-names.json"
_LIMIT_BYTES = 64 << 20


class PlacedFile(msgspec.Struct, frozen=True):
    path: str
    size: int
    digest: str = ""
    """algorithm:value as the source promised it; empty where it promised a size only"""


class Marker(msgspec.Struct, frozen=True, rename="camel"):
    fingerprint: str
    model: str
    source: str
    revision: str
    files: list[PlacedFile]
    version: int = 1

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def read_marker(folder: Tree) -> Marker | None:
    """None where there is none, or none that can be read."""
    content = folder.read(MARKER_FILE, _LIMIT_BYTES)
    if content is None:
        return None
    try:
        marker = msgspec.json.decode(content, type=Marker)
    except msgspec.DecodeError:
        return None
    return marker if marker.version == 1 else None


def whole(folder: Tree, marker: Marker) -> bool:
    """Every file is there with its size."""
    return all((found := folder.stat(file.path)) is not None and found.st_size == file.size for file in marker.files)


def write_marker(folder: Tree, marker: Marker) -> None:
    folder.write(MARKER_FILE, msgspec.json.format(msgspec.json.encode(marker)), durable=True)


def read_names(folder: Tree) -> set[str]:
    """Files that loads brought which did not end ready; only names that are safe to remove."""
    try:
        names = msgspec.json.decode(folder.read(NAMES_FILE, _LIMIT_BYTES) or b"[]", type=set[str])
        return {checked_name(name) for name in names}
    except (msgspec.DecodeError, LastingError):
        return set()


def write_names(folder: Tree, names: set[str]) -> None:
    folder.write(NAMES_FILE, msgspec.json.encode(sorted(names)), durable=True)
