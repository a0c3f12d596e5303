"""What is on the volume already is kept, shared, and never a way out of it."""

from __future__ import annotations

import asyncio
import os

import pytest

from controller.models.errors import LastingError, NoSpaceError, TransientError
from controller.models.lock import LOCK_FILE, held, this_machine
from controller.models.tree import Tree
from tests.models.hubs import TOKEN
from tests.models.origin import STATUS, noise

FILES = {"config.json": b"{}", "model.safetensors": noise(500_000, 1)}


def source(hub, **more):
    return {"kind": "huggingface", "endpoint": hub.api.url, **more}


async def test_second_model_links_what_the_first_one_loaded(hub, loader):
    hub.push(FILES)
    await loader(source(hub), folder="ns/one")
    sent = hub.sent
    await loader(source(hub), folder="ns/two")
    assert hub.sent - sent <= 1
    assert loader.files("ns/two") == FILES
    one, two = (loader.volume / "ns" / name / "model.safetensors" for name in ("one", "two"))
    assert one.stat().st_ino == two.stat().st_ino
    assert not one.stat().st_mode & 0o222, "a shared file is not written to by accident"


async def test_cache_gives_nothing_to_who_may_not_read(hub, loader):
    hub.push(FILES)
    hub.token, hub.gated = TOKEN, True
    await loader(source(hub), folder="one", environment={"HF_TOKEN": TOKEN})
    with pytest.raises(LastingError) as failed:
        await loader(source(hub), folder="two")
    assert failed.value.reason == "AccessDenied"
    assert loader.marker("two") is None


async def test_volume_without_a_cache(hub, loader):
    hub.push(FILES | {"copy.safetensors": FILES["model.safetensors"]})
    await loader(source(hub), cache="")
    assert loader.files() == FILES | {"copy.safetensors": FILES["model.safetensors"]}
    assert hub.storage.total_sent == 500_000
    assert sorted(path.name for path in (loader.volume / "model").glob(".arks-*")) == [
        ".arks-lock",
        ".arks-ready.json",
        ".arks-status.json",
    ]


async def test_volume_without_hard_links(hub, loader, monkeypatch):
    hub.push(FILES | {"copy.safetensors": FILES["model.safetensors"]})

    def refuse(*_, **__):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    await loader(source(hub))
    assert loader.files() == FILES | {"copy.safetensors": FILES["model.safetensors"]}


async def test_a_new_revision_brings_only_what_changed(hub, loader):
    old = hub.push(FILES | {"old.txt": b"old"})
    await loader(source(hub, revision=old))
    new = hub.push({"config.json": b"new", "model.safetensors": FILES["model.safetensors"]})
    (loader.volume / "model" / "notes.txt").write_text("the user's own")
    sent = hub.sent
    await loader(source(hub, revision=new))
    assert hub.sent - sent == 3
    assert loader.files() == {
        "config.json": b"new",
        "model.safetensors": FILES["model.safetensors"],
        "notes.txt": b"the user's own",
    }


async def test_shards_of_a_request_that_never_ended_do_not_stay(hub, loader):
    first = hub.push({"model-1-of-2.safetensors": noise(2000, 1), "model-2-of-2.safetensors": noise(3000, 2)})
    hub.storage.forever = True
    hub.storage.faults["model-2-of-2.safetensors"] = [(STATUS, 500)]
    with pytest.raises(TransientError):
        await loader(source(hub, revision=first), retries=2, connections=1)
    assert set(loader.files()) == {"model-1-of-2.safetensors"}
    second = hub.push({"model.safetensors": noise(1000, 3)})
    await loader(source(hub, revision=second))
    assert set(loader.files()) == {"model.safetensors"}


async def test_marker_goes_before_anything_changes(hub, loader):
    old = hub.push(FILES)
    await loader(source(hub, revision=old))
    with pytest.raises(LastingError):
        await loader(source(hub, revision="nothing"))
    assert loader.marker() is None


async def test_weights_of_another_tool_are_verified_and_adopted(hub, loader):
    hub.push(FILES)
    folder = loader.volume / "model"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    await loader(source(hub))
    assert hub.sent == 0
    await loader(source(hub), folder="other")
    assert hub.sent <= 1


async def test_damaged_file_of_the_right_size_is_loaded_anew(hub, loader):
    hub.push(FILES)
    folder = loader.volume / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(500_000))
    await loader(source(hub))
    assert loader.files() == FILES


async def test_no_space_is_found_before_the_first_byte(hub, loader):
    hub.push(FILES)
    with pytest.raises(NoSpaceError) as failed:
        await loader(source(hub), margin_bytes=1 << 60)
    assert "GiB are needed" in failed.value.message
    assert hub.sent == 0


async def test_unused_files_of_the_cache_make_room(hub, loader, monkeypatch):
    hub.push(FILES)
    await loader(source(hub), folder="one")
    blobs = [path for path in (loader.volume / ".arks-cache").iterdir() if path.stat().st_size == 500_000]
    assert len(blobs) == 1
    for path in (loader.volume / "one").iterdir():
        path.unlink()
    hub.push({"other.safetensors": noise(400_000, 7)})
    # The volume's word is replaced: too little until something is removed.
    monkeypatch.setattr(Tree, "free_bytes", lambda tree: 0 if blobs[0].exists() else 1 << 30)
    await loader(source(hub), folder="two")
    assert not blobs[0].exists()


async def test_files_in_use_are_never_removed_for_room(hub, loader, monkeypatch):
    hub.push(FILES)
    await loader(source(hub), folder="one")
    hub.push({"other.safetensors": noise(400_000, 7)})
    monkeypatch.setattr(Tree, "free_bytes", lambda tree: 0)
    with pytest.raises(NoSpaceError):
        await loader(source(hub), folder="two")
    assert loader.files("one") == FILES


@pytest.mark.parametrize("planted", ["model", "model/nested", ".arks-cache"])
async def test_links_on_the_volume_are_not_followed(hub, loader, tmp_path, planted):
    hub.push({"nested/config.json": b"{}", "model.safetensors": noise(2000)})
    outside = tmp_path / "outside"
    outside.mkdir()
    link = loader.volume / planted
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(LastingError) as failed:
        await loader(source(hub))
    assert failed.value.reason == "UnsafeStorage"
    assert list(outside.iterdir()) == []


async def test_a_link_with_a_file_s_name_is_replaced_not_written_through(hub, loader, tmp_path):
    hub.push(FILES)
    outside = tmp_path / "precious"
    outside.write_bytes(b"precious")
    (loader.volume / "model").mkdir()
    (loader.volume / "model" / "config.json").symlink_to(outside)
    await loader(source(hub))
    assert outside.read_bytes() == b"precious"
    assert loader.files() == FILES


@pytest.mark.parametrize("name", [LOCK_FILE, ".arks-status.json", ".arks-ready.json"])
async def test_links_with_the_loader_s_own_names_are_not_written_through(hub, loader, tmp_path, name):
    hub.push(FILES)
    outside = tmp_path / "precious"
    outside.write_bytes(b"precious")
    (loader.volume / "model").mkdir()
    (loader.volume / "model" / name).symlink_to(outside)
    if name == LOCK_FILE:
        with pytest.raises(LastingError):
            await loader(source(hub))
    else:
        await loader(source(hub))
        assert loader.files() == FILES
    assert outside.read_bytes() == b"precious"


@pytest.fixture
def folder(tmp_path):
    tree = Tree.open(str(tmp_path))
    yield tree
    tree.close()


def lock(folder, machine="here", waiting=lambda: None, silence_s=0.3):
    return held(folder, poll_s=0.01, silence_s=silence_s, waiting=waiting, machine=machine)


async def test_lock_waits_for_its_holder(folder):
    order, waited = [], []

    async def second():
        async with lock(folder, waiting=lambda: waited.append(1)):
            order.append("second")

    async with lock(folder):
        task = asyncio.create_task(second())
        await asyncio.sleep(0.3)
        order.append("first")
    await asyncio.wait_for(task, 60)
    assert (order, waited) == (["first", "second"], [1])


@pytest.mark.parametrize("locks", [True, None], ids=["flock not passed on", "no flock at all"])
async def test_lock_of_a_living_machine_is_respected_where_flock_is_not(folder, monkeypatch, locks):
    # As on a file system whose locks end at the node: every flock is granted.
    monkeypatch.setattr("controller.models.lock._flock", lambda fd: locks)
    order = []

    async def second():
        async with lock(folder, machine="there"):
            order.append("second")

    async with lock(folder):
        task = asyncio.create_task(second())
        await asyncio.sleep(1.0)
        order.append("first")
    await asyncio.wait_for(task, 60)
    assert order == ["first", "second"]


async def test_lock_of_a_dead_machine_is_taken_over(folder):
    folder.write(LOCK_FILE, b"dead-machine 1-abc 17\n")
    async with asyncio.timeout(60), lock(folder):
        assert folder.read(LOCK_FILE, 100).startswith(b"here ")
    assert folder.read(LOCK_FILE, 100) == b""


async def test_lock_of_a_dead_process_here_is_taken_over_at_once(folder):
    folder.write(LOCK_FILE, b"here 1-abc 17\n")
    async with asyncio.timeout(60), lock(folder, silence_s=60):
        pass
    assert this_machine()
