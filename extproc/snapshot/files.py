"""A folder of YAML as one policy, read again at the price of what changed.

Files are cut at `---` lines into pieces; a piece is parsed once and found again by the hash of its text, a file whose
size, time and inode stand still is not opened. One thread at a time; it breathes between pieces, so that the event
loop beside it gets the interpreter within a millisecond or so.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import msgspec

from apis.compile import link
from apis.fragments import Fragment, Ident
from apis.policy import EMPTY, Policy
from extproc.snapshot.breath import Breath, let_go
from extproc.snapshot.errors import Note, PolicyError, PolicyErrors
from extproc.snapshot.reader import Fault, Piece, read
from extproc.snapshot.yamltree import MAX_DOCUMENT_BYTES

MAX_FILE_BYTES: Final = 64 * 1024 * 1024
SUFFIXES: Final = (".yaml", ".yml", ".json")

_Stamp: TypeAlias = tuple[int, int, int, int]
Signature: TypeAlias = tuple[tuple[int, int], tuple[tuple[str, _Stamp | None], ...]]
"""The folder's identity, then each file's name and stamp; equal signatures: nothing happened."""


class _Cut(msgspec.Struct, frozen=True, gc=False):
    """A piece at its place in a file."""

    line: int
    digest: bytes
    piece: Piece


class _Place(msgspec.Struct, frozen=True, gc=False):
    file: str
    line: int
    """from 1"""
    fields: tuple[tuple[str, int], ...]
    """lines of fields, from 0, within the piece"""
    offset: int
    """of the piece in its file"""

    def of(self, path: str) -> int:
        """The line of a field, or of the nearest known thing around it; from 1."""
        best, found = "", self.line
        for known, line in self.fields:
            if path.startswith(known) and len(known) > len(best):
                best, found = known, self.offset + line + 1
        return found


@dataclass(frozen=True, slots=True)
class Loaded:
    policy: Policy
    notes: tuple[Note, ...]


class Folder:
    """Not thread-safe: one call at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, tuple[_Stamp, tuple[_Cut, ...]]] = {}
        self._pieces: dict[bytes, Piece] = {}
        self._policy = EMPTY
        self._breath = Breath()

    def signature(self) -> Signature | None:
        """None: there is no such folder (now)."""
        try:
            own = self.path.stat()
            names = self._names()
        except OSError:
            return None
        return (own.st_dev, own.st_ino), tuple((name, self._stamp(name)) for name in names)

    def load(self) -> Loaded:
        """The folder as it is now.

        Raises:
            PolicyErrors: with every fault of every file. The next call starts from the same last good policy.
        """
        try:
            names = self._names()
        except OSError as error:
            raise PolicyErrors(
                (
                    PolicyError(
                        str(self.path), 0, "", f"cannot be listed: {error.strerror}", "name a folder of YAML files"
                    ),
                )
            ) from None
        errors: list[PolicyError] = []
        files: dict[str, tuple[_Stamp, tuple[_Cut, ...]]] = {}
        pieces: dict[bytes, Piece] = {}
        for name in names:
            stamp = self._stamp(name)
            known = self._files.get(name)
            unchanged = known is not None and known[0] == stamp
            cuts = known[1] if known and unchanged else tuple(self._read(name, pieces, errors))
            if stamp is not None:
                files[name] = (stamp, cuts)
            for cut in cuts:
                pieces[cut.digest] = cut.piece
        # Also after a fault: files that were fine need no second look; files that could not be read are tried again.
        failed = {error.file for error in errors}
        retired = list(self._pieces.values())
        self._files = {name: entry for name, entry in files.items() if name not in failed}
        self._pieces = pieces
        let_go(retired)
        return self._join(files, errors)

    def _names(self) -> list[str]:
        with os.scandir(self.path) as entries:
            return sorted(e.name for e in entries if e.name.endswith(SUFFIXES) and not e.name.startswith("."))

    def _stamp(self, name: str) -> _Stamp | None:
        try:
            found = (self.path / name).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size

    def _read(self, name: str, pieces: dict[bytes, Piece], errors: list[PolicyError]) -> Iterator[_Cut]:
        try:
            # A pipe would be waited for; only regular files are policy.
            handle = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    errors.append(PolicyError(name, 0, "", "is no regular file", "put YAML files into the folder"))
                    return
                if found.st_size > MAX_FILE_BYTES:
                    errors.append(_too_large(name))
                    return
                for line, text in self._cuts(file):
                    if text is None:
                        errors.append(_too_large(name) if line < 0 else _too_long(name, line + 1))
                        continue
                    digest = blake2b(text, digest_size=16).digest()
                    piece = pieces.get(digest) or self._pieces.get(digest)
                    if piece is None:
                        piece = read(text)
                        self._breath()
                    pieces[digest] = piece
                    yield _Cut(line, digest, piece)
        except OSError as error:
            errors.append(PolicyError(name, 0, "", f"cannot be read: {error.strerror}", "check the file's permissions"))

    def _cuts(self, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
        """(line from 0, text) of each piece. No text: the piece that begins there is too long; line -1: the file is.

        Nothing may stand at a line's start inside a document that looks like `---` and a space or line end (YAML 1.2,
        c-forbidden), so the cut needs no parser.
        """
        held: list[bytes] = []
        size = total = number = start = 0
        too_long = False
        while line := file.readline(MAX_DOCUMENT_BYTES):
            total += len(line)
            if total > MAX_FILE_BYTES:
                yield -1, None
                return
            if line.startswith(b"---") and line[3:4] in {b"", b" ", b"\t", b"\n", b"\r"}:
                if too_long:
                    yield start, None
                elif held:
                    yield start, b"".join(held)
                held, size, start, too_long = [], 0, number, False
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                held, too_long = [], True
            else:
                held.append(line)
            number += 1
            if not number % 512:
                self._breath()
        if too_long:
            yield start, None
        elif held:
            yield start, b"".join(held)

    def _join(self, files: dict[str, tuple[_Stamp, tuple[_Cut, ...]]], errors: list[PolicyError]) -> Loaded:
        notes: list[Note] = []
        fragments: dict[Ident, Fragment] = {}
        places: dict[Ident, _Place] = {}
        for name, (_, cuts) in files.items():
            for cut in cuts:
                piece, offset = cut.piece, cut.line
                for item in piece.items:
                    ident = item.fragment.ident
                    place = _Place(name, offset + item.line + 1, item.places, offset)
                    if ident in fragments:
                        errors.append(_twice(ident, places[ident], place))
                    else:
                        fragments[ident] = item.fragment
                        places[ident] = place
                if piece.faults:
                    errors += (_placed(name, offset, fault) for fault in piece.faults)
                if piece.remarks:
                    notes += (Note(name, offset + one.line + 1, one.path, one.text) for one in piece.remarks)
            self._breath()
        linked = link(fragments, self._policy)
        self._breath()
        for problem in linked.problems:
            place = places[problem.ident]
            errors.append(PolicyError(place.file, place.of(problem.path), problem.path, problem.text, problem.fix))
        if errors:
            raise PolicyErrors(tuple(sorted(errors)))
        for remark in linked.notes:
            place = places[remark.ident]
            notes.append(Note(place.file, place.of(remark.path), remark.path, remark.text))
        if not fragments:
            notes.append(Note(str(self.path), 0, "", "holds no policy: every request will be refused"))
        self._policy = linked.policy
        return Loaded(linked.policy, tuple(sorted(notes)))


def load_folder(path: Path | str) -> Loaded:
    """The folder's policy, once.

    Raises:
        PolicyErrors: with every fault of every file.
    """
    return Folder(Path(path)).load()


def _placed(name: str, offset: int, fault: Fault) -> PolicyError:
    return PolicyError(name, offset + fault.line + 1, fault.path, fault.problem, fault.fix)


def _twice(ident: Ident, first: _Place, second: _Place) -> PolicyError:
    return PolicyError(
        second.file,
        second.line,
        "metadata.name",
        f"{ident.kind} {ident.namespace}/{ident.name} is already at {first.file}:{first.line}",
        "keep one of the two, or rename one",
    )


def _too_large(name: str) -> PolicyError:
    return PolicyError(name, 0, "", f"is larger than {MAX_FILE_BYTES} bytes", "split it into several files")


def _too_long(name: str, line: int) -> PolicyError:
    return PolicyError(
        name,
        line,
        "",
        f"has a document larger than {MAX_DOCUMENT_BYTES} bytes",
        "split it at --- lines, one per object",
    )
