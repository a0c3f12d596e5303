"""Files out of a tar archive, as a registry's layers may be: regular files only, under safe names.

An archive comes from outside. Links and devices are refused rather than passed over, since a model that needs one
would be incomplete; owners, modes and times are not taken over.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable

from controller.models.errors import ContentError, LastingError
from controller.models.marker import PlacedFile
from controller.models.sources.source import Unpack
from controller.models.tree import Tree, checked_name

_BLOCK = 4 << 20
_FIELD = "spec.source.oci.reference"


def unpacked(
    fd: int, how: Unpack, target: Tree, wanted: Callable[[str], bool], stopped: Callable[[], bool]
) -> list[PlacedFile]:
    """Blocks: run it in a thread. Ends early when stopped. Raises LoadError, OSError."""
    placed: list[PlacedFile] = []
    try:
        with os.fdopen(os.dup(fd), "rb") as source:
            source.seek(0)
            with tarfile.open(fileobj=source, mode="r|gz" if how == "tar+gzip" else "r|") as archive:
                for member in archive:
                    if stopped():
                        break
                    name = member.name.removeprefix("./").rstrip("/")
                    if member.isdir() or not name:
                        continue
                    checked_name(name)
                    if not member.isreg():
                        told = f"the artifact's archive holds a link or device: {name[:200]!r}"
                        raise LastingError("UnsupportedArtifact", told, field=_FIELD)
                    if wanted(name):
                        placed.append(_placed(archive, member, name, target, stopped))
    except (tarfile.TarError, EOFError, zlib.error):
        raise ContentError("a layer of the artifact is not the archive that its type says") from None
    return placed


def _placed(
    archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, target: Tree, stopped: Callable[[], bool]
) -> PlacedFile:
    content = archive.extractfile(member)
    assert content is not None
    hasher = hashlib.sha256()
    target.remove(name)
    descriptor = target.descriptor(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    with os.fdopen(descriptor, "wb") as file:
        while (block := content.read(_BLOCK)) and not stopped():
            hasher.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PlacedFile(name, member.size, f"sha256:{hasher.hexdigest()}")
