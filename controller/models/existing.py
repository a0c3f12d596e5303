"""Weights that are there already, in a claim or on a node: looked at, never written.

Looks for what engines fail on late and obscurely: an empty folder, no file of weights, a shard that the index names
and that is missing, a safetensors file shorter than its header says (a copy that broke off).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from controller.models.errors import LastingError

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".engine", ".msgpack")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_HEADER_LIMIT_BYTES = 100 << 20  # as the format's own reader has it


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Existing:
    files: int
    size: int


def verified(path: str, field: str, stopped: Callable[[], bool]) -> Existing:
    """Blocks: run it in a thread. Raises LastingError that names ``field``."""
    root = Path(path)
    if not root.is_dir():
        raise LastingError("NotFound", "the folder of the weights is not there", field=field)
    inside = root.resolve()
    count = total = 0
    weights: list[Path] = []
    for file in _files(root):
        if stopped():
            break
        # Links inside the volume are usual (a hub's cache is made of them); one that leads out would dangle in a pod.
        if file.is_symlink() and not file.resolve().is_relative_to(inside.parent):
            continue
        if not file.is_file():
            continue
        count += 1
        total += file.stat().st_size
        if file.suffix in _WEIGHTS:
            weights.append(file)
    if not weights:
        told = "the folder holds no file of weights (safetensors, gguf, bin, pt, …)"
        raise LastingError("NoWeights", told, field=field)
    for name in _INDEXES:
        _whole_index(root / name, field)
    for file in weights:
        if file.suffix == ".safetensors":
            _whole_safetensors(file, field)
        elif file.stat().st_size == 0:
            raise LastingError("IncompleteWeights", f"{file.name} is empty", field=field)
    return Existing(count, total)


def _files(root: Path) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=refused):
        yield from (Path(folder) / name for name in names)


def _whole_index(index: Path, field: str) -> None:
    if not index.is_file():
        return
    try:
        shards = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except msgspec.DecodeError:
        raise LastingError("IncompleteWeights", f"{index.name} cannot be read", field=field) from None
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        told = f"{len(missing)} of {len(shards)} files that {index.name} names are missing, first {missing[0][:200]}"
        raise LastingError("IncompleteWeights", told, field=field)


def _whole_safetensors(file: Path, field: str) -> None:
    """Layout: 8 bytes little-endian length of a JSON header, the header, the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = content.read(length) if 2 <= length <= min(_HEADER_LIMIT_BYTES, size - 8) else b""
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        ends = [
            msgspec.json.decode(raw, type=_Entry).data_offsets[1]
            for name, raw in entries.items()
            if name != "__metadata__"
        ]
    except msgspec.DecodeError:
        raise LastingError("IncompleteWeights", f"{file.name} is no whole safetensors file", field=field) from None
    if size != 8 + length + max(ends, default=0):
        told = f"{file.name} has {size} bytes and its header says {8 + length + max(ends, default=0)}"
        raise LastingError("IncompleteWeights", told, field=field)
