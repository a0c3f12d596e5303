"""Weights that are there already: what an engine would fail on late is told at once, and nothing is written."""

from __future__ import annotations

import json
import struct

import pytest

from controller.models.errors import LastingError


def safetensors(size):
    header = json.dumps({"__metadata__": {"a": "b"}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size)


@pytest.fixture
def weights(loader):
    folder = loader.volume / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors(1000))
    return folder


KINDS = [{"kind": "pvc", "claimName": "weights", "subPath": "model"}, {"kind": "hostPath", "path": "/weights"}]


@pytest.mark.parametrize("source", KINDS, ids=lambda one: one["kind"])
async def test_whole_weights_are_ready_and_untouched(loader, weights, source):
    before = sorted(weights.iterdir())
    assert await loader(source) is None
    assert sorted(weights.iterdir()) == before
    assert loader.progress.files_done == 2
    assert loader.progress.bytes_done == 2 + len(safetensors(1000))


async def reason(loader, source):
    with pytest.raises(LastingError) as failed:
        await loader(source)
    assert failed.value.field == f"spec.source.{source['kind']}"
    return failed.value.reason


@pytest.mark.parametrize("source", KINDS, ids=lambda one: one["kind"])
async def test_no_folder(loader, source):
    assert await reason(loader, source) == "NotFound"


async def test_no_weights(loader, weights):
    (weights / "model.safetensors").unlink()
    assert await reason(loader, KINDS[0]) == "NoWeights"


@pytest.mark.parametrize("content", [safetensors(1000)[:-1], safetensors(1000) + b"x", b"", b"\xff" * 100, b"\x01"])
async def test_file_that_is_not_whole(loader, weights, content):
    (weights / "model.safetensors").write_bytes(content)
    assert await reason(loader, KINDS[0]) == "IncompleteWeights"


async def test_shard_that_is_missing(loader, weights):
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002.safetensors"}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    assert await reason(loader, KINDS[0]) == "IncompleteWeights"
    (weights / "model-00002.safetensors").write_bytes(safetensors(1))
    await loader(KINDS[0])


async def test_links_inside_the_volume_count_and_others_do_not(loader, weights, tmp_path):
    (weights / "model.safetensors").rename(loader.volume / "blob")
    (weights / "model.safetensors").symlink_to("../blob")
    await loader(KINDS[0])
    (tmp_path / "outside").write_bytes(safetensors(10))
    (weights / "model.safetensors").unlink()
    (weights / "model.safetensors").symlink_to(tmp_path / "outside")
    assert await reason(loader, KINDS[0]) == "NoWeights"
