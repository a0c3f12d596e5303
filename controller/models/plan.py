"""What a listing asks of a volume: names that are safe, content by content, and room for what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.models.blobs import Blobs
from controller.models.errors import LastingError, NoSpaceError
from controller.models.sources.source import Listing, RemoteFile
from controller.models.tree import checked_name


@dataclass(slots=True)
class Plan:
    """``groups``: names by content. ``missing`` are those contents that no file of the target has."""

    listing: Listing
    groups: dict[str, list[RemoteFile]]
    missing: dict[str, list[RemoteFile]] = field(default_factory=dict)


def planned(listing: Listing) -> Plan:
    names: set[str] = set()
    groups: dict[str, list[RemoteFile]] = {}
    for file in listing.files:
        checked_name(file.path)
        if file.path in names and not file.unpack:
            raise LastingError("UnsafeFileName", f"the source lists a file twice: {file.path[:200]!r}")
        names.add(file.path)
        groups.setdefault(file.key, []).append(file)
    for name in names:
        folder = name.rpartition("/")[0]
        while folder:
            if folder in names:
                raise LastingError("UnsafeFileName", f"the source lists a file where it has a folder: {folder[:200]!r}")
            folder = folder.rpartition("/")[0]
    if not groups:
        told = "no file of the source is wanted: check include, exclude, and the source's own path"
        raise LastingError("NothingToLoad", told, field="spec.source")
    return Plan(listing, groups)


def make_room(plan: Plan, blobs: Blobs, margin_bytes: int) -> None:
    """Before the first byte: raises NoSpaceError where the missing bytes would not fit."""
    needed = 0
    for key, files in plan.missing.items():
        file = files[0]
        if not blobs.has(key, file.size):
            needed += file.size - blobs.written_bytes(key, file.size)
        if file.unpack:
            needed += file.size * (2 if file.unpack == "tar+gzip" else 1)
    if not needed:
        return
    needed += max(margin_bytes, needed // 100) if margin_bytes else 0
    free = blobs.folder.free_bytes()
    if free < needed:
        free += blobs.prune(needed - free, frozenset(plan.groups))
    if free < needed:
        told = f"{_words(needed)} are needed and {_words(free)} are free on the volume; enlarge the storage"
        raise NoSpaceError(told)


def _words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
