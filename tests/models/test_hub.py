"""A hub's repository arrives whole, pinned and verified, whatever the network does."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from controller.models.errors import ContentError, LastingError, TransientError
from tests.models.hubs import SIGNATURE, TOKEN
from tests.models.origin import CUT, STATUS, WRONG, noise

FILES = {
    "config.json": b'{"architectures": ["Some"]}',
    "empty.txt": b"",
    "model.safetensors": noise(1_000_000, 1),
    "nested/deep er/tokenizer+ü.json": noise(1500, 2),
}


def source(hub, **more):
    return {"kind": "huggingface", "endpoint": hub.api.url, **more}


async def test_whole_repository_is_loaded_and_marked_last(hub, loader):
    commit = hub.push(FILES)
    marker = await loader(source(hub))
    assert loader.files() == FILES
    told = loader.marker()
    assert told["revision"] == commit == marker.revision
    assert {file["path"]: file["size"] for file in told["files"]} == {name: len(data) for name, data in FILES.items()}
    assert all(file["digest"].startswith(("sha256:", "git-sha1:")) for file in told["files"])
    status = loader.status()
    assert (status.state, status.revision) == ("ready", commit)
    assert status.bytes_done == status.bytes_total == sum(map(len, FILES.values()))
    assert status.files_done == status.files_total == 4
    assert hub.sent == sum(map(len, FILES.values()))


async def test_ready_folder_needs_no_network(hub, loader):
    hub.push(FILES)
    await loader(source(hub))
    await hub.stop()
    await loader(source(hub))
    await hub.start()


async def test_marker_beside_a_lost_file_is_not_believed(hub, loader):
    hub.push(FILES)
    await loader(source(hub))
    (loader.volume / "model/model.safetensors").unlink()
    sent = hub.sent
    await loader(source(hub))
    assert loader.files() == FILES
    assert hub.sent - sent <= 1, "the volume's cache had it; only the right to read was asked for"


@pytest.mark.parametrize("when", ["on_resolved", "on_listed"])
async def test_branch_that_moves_while_loading_changes_nothing(hub, loader, when):
    first = hub.push(FILES)
    setattr(hub, when, lambda: hub.push({"config.json": b"new"}))
    marker = await loader(source(hub))
    assert marker.revision == first
    assert loader.files() == FILES


async def test_revision_is_followed(hub, loader):
    old = hub.push({"config.json": b"old"})
    hub.push({"config.json": b"new"})
    await loader(source(hub, revision=old))
    assert loader.files() == {"config.json": b"old"}


async def test_pages_are_followed_at_the_mirror_itself(hub, loader):
    files = {f"file-{n}.txt": b"%d" % n for n in range(25)}
    hub.push(files)
    hub.page, hub.next_link_base = 10, "http://hub.invalid"
    await loader(source(hub))
    assert loader.files() == files


async def test_patterns_choose_files(hub, loader):
    hub.push({"a.safetensors": b"1", "a.bin": b"2", "sub/b.safetensors": b"3", "original/c.safetensors": b"4"})
    await loader(source(hub, include=["*.safetensors"], exclude=["original/"]))
    assert set(loader.files()) == {"a.safetensors", "sub/b.safetensors"}


async def test_patterns_that_leave_nothing_are_told(hub, loader):
    hub.push(FILES)
    with pytest.raises(LastingError) as failed:
        await loader(source(hub, include=["*.gguf"]))
    assert (failed.value.reason, failed.value.exit_code) == ("NothingToLoad", 3)


async def test_endpoint_by_environment(hub, loader):
    hub.push(FILES)
    await loader({"kind": "huggingface"}, environment={"HF_ENDPOINT": hub.api.url + "/"})
    assert loader.files() == FILES


async def test_token_goes_to_the_hub_and_nowhere_else(hub, loader):
    hub.push(FILES)
    hub.token = TOKEN
    await loader(source(hub), environment={"HF_TOKEN": TOKEN})
    assert loader.files() == FILES
    assert all("Authorization" not in headers for _, _, headers in hub.storage.requests)
    assert TOKEN not in loader.said()


async def test_connection_cut_in_the_middle_goes_on_there(hub, loader):
    hub.push(FILES)
    hub.storage.faults["model.safetensors"] = [(CUT, 100_000), (CUT, 30_000), (CUT, 0)]
    await loader(source(hub))
    assert loader.files() == FILES
    assert hub.storage.sent["model.safetensors"] == 1_000_000, "no byte came twice"


async def test_busy_and_broken_servers_are_waited_for(hub, loader):
    hub.push(FILES)
    hub.api.faults["api"] = [(STATUS, 503), (STATUS, 429, {"Retry-After": "0.2"}), (STATUS, 500)]
    hub.storage.faults["model.safetensors"] = [(STATUS, 429, {"Retry-After": "0.1"}), (STATUS, 502)]
    began = time.monotonic()
    await loader(source(hub))
    assert loader.files() == FILES
    assert time.monotonic() - began >= 0.3, "it came back before it was asked to"


async def test_a_host_that_asks_for_patience_gets_it_from_every_connection(hub, loader):
    hub.push({"a.bin": noise(2000, 1), "b.bin": noise(2000, 2), "c.bin": noise(2000, 3)})
    came = []

    class Faults(dict):
        def get(self, name, default=None):
            came.append(time.monotonic())
            return [(STATUS, 429, {"Retry-After": "0.4"})] if len(came) == 1 else None

    hub.storage.faults = Faults()
    await loader(source(hub), connections=1)
    assert len(came) == 4
    assert came[1] - came[0] >= 0.4


async def test_expired_signed_url_is_asked_for_again(hub, loader):
    hub.push(FILES)
    hub.storage.faults["model.safetensors"] = [(STATUS, 403)]
    await loader(source(hub))
    assert loader.files() == FILES


async def test_tries_are_bounded(hub, loader):
    hub.push(FILES)
    hub.storage.forever = True
    hub.storage.faults["model.safetensors"] = [(STATUS, 500)]
    with pytest.raises(TransientError) as failed:
        await loader(source(hub), retries=3)
    assert failed.value.exit_code == 1
    assert len([1 for _, path, _ in hub.storage.requests if "model.safetensors" in path]) == 4
    assert loader.marker() is None
    assert loader.status().state == "failed"
    assert SIGNATURE not in loader.said()


async def test_a_server_that_cuts_every_answer_does_not_hold_it_for_ever(hub, loader):
    hub.push(FILES)
    hub.storage.forever = True
    hub.storage.faults["model.safetensors"] = [(CUT, 10)]
    with pytest.raises(TransientError):
        await loader(source(hub), retries=3)


async def test_wrong_content_is_loaded_anew(hub, loader):
    hub.push(FILES)
    hub.storage.faults["model.safetensors"] = [(WRONG,)]
    await loader(source(hub))
    assert loader.files() == FILES


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
async def test_wrong_content_is_never_put_in_place(hub, loader, name):
    hub.push(FILES)
    for origin in (hub.storage, hub.api):
        origin.forever = True
        origin.faults[name] = [(WRONG,)]
    with pytest.raises(ContentError) as failed:
        await loader(source(hub))
    assert name in failed.value.message
    assert name not in loader.files()
    assert loader.marker() is None


async def test_longer_or_shorter_files_than_listed_are_refused(hub, loader):
    hub.push(FILES)
    hub.lie_sizes["model.safetensors"] = 999_999
    with pytest.raises(TransientError):
        await loader(source(hub), retries=1)
    assert "model.safetensors" not in loader.files()


async def test_server_without_ranges(hub, loader):
    hub.push(FILES)
    hub.storage.ranges = False
    hub.storage.faults["model.safetensors"] = [(CUT, 200_000)]
    await loader(source(hub))
    assert loader.files() == FILES
    assert loader.progress.bytes_done == loader.progress.bytes_total


async def test_one_connection_is_enough(hub, loader):
    hub.push(FILES)
    hub.storage.faults["model.safetensors"] = [(CUT, 10_000)]
    await loader(source(hub), connections=1)
    assert loader.files() == FILES
    assert hub.storage.most_at_once == 1


async def test_a_hundred_files_at_once_stay_within_the_connections(hub, loader):
    files = {f"part-{n}.bin": noise(40_000 + n, n) for n in range(100)}
    hub.push(files)
    hub.storage.pause_s = 0.001
    await loader(source(hub), connections=8)
    assert loader.files() == files
    assert 2 <= hub.storage.most_at_once <= 8
    assert hub.storage.total_sent == sum(map(len, files.values()))


REFUSALS = [
    ({}, {"token": TOKEN, "gated": True}, "AccessDenied", "spec.source.huggingface.tokenSecretRef"),
    (
        {"HF_TOKEN": "hf_wrong"},
        {"token": TOKEN, "gated": True},
        "AccessDenied",
        "spec.source.huggingface.tokenSecretRef",
    ),
    ({}, {"token": TOKEN}, "NotFound", "spec.model"),
    ({}, {"model": "org/other"}, "NotFound", "spec.model"),
]


@pytest.mark.parametrize(("environment", "state", "reason", "field"), REFUSALS)
async def test_refusals_name_the_field_and_no_secret(hub, loader, environment, state, reason, field):
    hub.push(FILES)
    for name, value in state.items():
        setattr(hub, name, value)
    with pytest.raises(LastingError) as failed:
        await loader(source(hub), environment=environment)
    assert (failed.value.reason, failed.value.field, failed.value.exit_code) == (reason, field, 3)
    assert loader.status().field == field
    assert "hf_wrong" not in loader.said() + str(failed.value)


@pytest.mark.parametrize(
    ("status", "code", "reason", "field"),
    [
        (401, "", "Unauthorized", "spec.source.huggingface.tokenSecretRef"),
        (403, "", "AccessDenied", "spec.source.huggingface.tokenSecretRef"),
        (404, "RevisionNotFound", "NotFound", "spec.source.huggingface.revision"),
        (404, "", "NotFound", "spec.model"),
        (400, "", "SourceRefused", "spec.source.huggingface"),
    ],
)
async def test_lasting_statuses_are_not_tried_again(hub, loader, status, code, reason, field):
    hub.push(FILES)
    hub.api.faults["api"] = [(STATUS, status, {"X-Error-Code": code})]
    with pytest.raises(LastingError) as failed:
        await loader(source(hub))
    assert (failed.value.reason, failed.value.field) == (reason, field)
    assert len(hub.api.requests) == 1


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "a//b", "a\\..\\b", ".", "a/./b", "a\nb", "x" * 300, ".arks-ready.json"],
)
async def test_file_names_that_lead_elsewhere_are_refused(hub, loader, name):
    hub.push({"config.json": b"1"})
    hub.extra_entries = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}]
    with pytest.raises(LastingError) as failed:
        await loader(source(hub))
    assert failed.value.reason == "UnsafeFileName"
    assert loader.files() == {}


async def test_a_file_where_another_has_its_folder_is_refused(hub, loader):
    hub.push({"a": b"1", "a/b": b"2"})
    with pytest.raises(LastingError, match="folder"):
        await loader(source(hub))


@pytest.mark.parametrize("model", ["../x", "org/../x", "org/model/../../x", "a b/c", "", "org/model?x=1"])
async def test_repository_names_do_not_change_the_url(hub, loader, model):
    with pytest.raises(LastingError) as failed:
        await loader(source(hub), model=model)
    assert failed.value.field == "spec.model"
    assert hub.api.requests == []


async def test_unreachable_hub_is_tried_later(loader):
    with pytest.raises(TransientError) as failed:
        await loader({"kind": "huggingface", "endpoint": "http://127.0.0.1:1"}, retries=1)
    assert failed.value.reason == "Unreachable"


async def test_silent_server_is_left(hub, loader):
    hub.push(FILES)
    hub.storage.gate = asyncio.Event()
    with pytest.raises(TransientError) as failed:
        await loader(source(hub), retries=0, silence_timeout_s=0.2)
    assert "silent" in failed.value.message


async def test_requests_go_through_the_proxy(hub, loader, monkeypatch):
    hub.push({"config.json": b"through"})
    hub.model = "org/model"
    monkeypatch.setenv("http_proxy", hub.api.url)
    monkeypatch.setenv("no_proxy", "")
    # The hub's own server stands for the proxy: it is asked for another host's URLs, in absolute form.
    await loader({"kind": "huggingface", "endpoint": "http://hub.invalid"})
    assert loader.files() == {"config.json": b"through"}
    assert {headers["Host"] for _, _, headers in hub.api.requests} == {"hub.invalid"}
    assert all(path.startswith("http://hub.invalid/") for _, path, _ in hub.api.requests)


async def test_progress_lines_are_reports(hub, loader):
    hub.push({"big.bin": noise(2_000_000)})
    hub.storage.pause_s = 0.03
    await loader(source(hub), report_every_s=0.05, connections=1)
    told = [json.loads(line) for line in loader.lines]
    done = [one["bytesDone"] for one in told if one["state"] == "loading" and one.get("bytesDone")]
    assert len(done) > 3
    assert done == sorted(done)
    assert told[-1]["state"] == "ready"
    assert any(one.get("bytesPerSecond", 0) > 0 for one in told)
