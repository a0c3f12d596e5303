"""What the controller writes is what the loader reads; reports read back; parts add up."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apis.resources import ArksModel
from controller.models.errors import LastingError
from controller.models.http import retry_after_s
from controller.models.part import claim, gaps, merged, read_journal
from controller.models.patterns import wanted
from controller.models.progress import termination_message
from controller.models.report import Report, parse_report
from controller.models.request import Settings, decode_request, placed
from controller.models.tree import Tree, checked_name
from controller.reconcile.desired.model import load_request
from controller.reconcile.desired.storage import storage_of

SECRET = {"name": "secret"}
SOURCES = {
    "huggingface": {
        "tokenSecretRef": SECRET,
        "endpoint": "https://mirror.example.org",
        "revision": "v1",
        "include": ["*.json"],
        "exclude": ["original/"],
        "proxy": {"httpProxy": "http://proxy:3128"},
    },
    "modelscope": {"tokenSecretRef": SECRET, "revision": "master"},
    "s3": {
        "bucket": "weights",
        "prefix": "qwen",
        "endpoint": "https://minio.example.org",
        "region": "eu-west-1",
        "credentialsSecretRef": SECRET,
        "pathStyle": True,
        "include": ["*"],
    },
    "oci": {"reference": "registry.example.org/a:v1", "pullSecretRef": SECRET, "plainHttp": True},
    "pvc": {"claimName": "weights", "subPath": "qwen"},
    "hostPath": {"path": "/weights"},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_of_a_model_is_understood(kind):
    model = ArksModel.model_validate(
        {
            "metadata": {"name": "m", "namespace": "ns"},
            "spec": {
                "model": "org/model",
                "source": {kind: SOURCES[kind]},
                "storage": {"pvc": {"name": "claim", "spec": {}}},
            },
        }
    )
    storage, problem = storage_of(model, read_only=False)
    assert problem is None
    request = decode_request(json.dumps(load_request(model, storage)))
    assert (request.model, request.kind, request.path) == ("org/model", kind, storage.path)
    for name, value in SOURCES[kind].items():
        if not name.endswith("SecretRef") and name != "proxy":
            snake = "".join("_" + letter.lower() if letter.isupper() else letter for letter in name)
            assert getattr(request.source, snake) == value


def asked(path="/models/m", **source):
    return decode_request(json.dumps({"model": "m", "path": path, "source": {"kind": "huggingface", **source}}))


def test_fingerprint_tells_requests_apart_and_not_places():
    assert asked().fingerprint() == asked("/models/elsewhere").fingerprint()
    assert asked().fingerprint() == asked(include=[]).fingerprint()
    different = [asked(), asked(revision="v1"), asked(include=["a"]), asked(exclude=["a"]), asked(endpoint="http://x")]
    assert len({one.fingerprint() for one in different}) == len(different)


@pytest.mark.parametrize("path", ["relative", "/models/../etc", ""])
def test_paths_that_leave_the_volume_are_refused(path):
    with pytest.raises(LastingError):
        asked(path)


def test_unknown_fields_are_refused_without_their_values():
    with pytest.raises(LastingError) as failed:
        asked(token="hf_secret")
    assert "hf_secret" not in failed.value.message


def test_where_files_go():
    assert placed(asked("/models/a/b"), Settings()) == ("/models", "a/b", ".arks-cache")
    assert placed(asked("/models"), Settings()) == ("/models", "", "")
    assert placed(asked("/elsewhere/a"), Settings()) == ("/elsewhere", "a", "")
    assert placed(asked("/models/a"), Settings(cache="/models/shared/c")) == ("/models", "a", "shared/c")
    assert placed(asked("/models/a"), Settings(cache=""))[2] == ""
    with pytest.raises(LastingError):
        placed(asked("/models/a"), Settings(cache="/other"))


@pytest.mark.parametrize("name", ["ARKS_LOADER_CONNECTIONS", "ARKS_LOADER_REPORT_S", "ARKS_LOADER_PIECE_BYTES"])
@pytest.mark.parametrize("value", ["x", "0", "-1", "nan"])
def test_settings_out_of_range_are_told(name, value):
    with pytest.raises(LastingError, match=name):
        Settings.of({name: value})


def test_report_is_found_in_a_log():
    report = Report(state="failed", reason="NoSpace", field="spec.storage", message="full", bytes_total=5)
    line = termination_message(report).decode()
    assert parse_report(f'{{"state":"loading"}}\n{line}\nTraceback …\n{{"state": 1}}') == report
    assert parse_report("") is None
    assert parse_report("Killed") is None
    assert len(termination_message(Report(state="failed", message="x" * 9000))) <= 4096


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_a_name_that_is_let_through_stays_below(name):
    try:
        checked_name(name)
    except LastingError:
        return
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
    assert not name.startswith("/")


stretches = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda one: (one[0], one[0] + one[1])))


@given(stretches, st.integers(0, 100))
@settings(max_examples=200)
def test_what_is_written_and_what_is_missing_make_the_file(written, size):
    done = {n for first, last in written for n in range(first, last + 1)}
    whole = [(first, min(last, size - 1)) for first, last in merged(written) if first < size]
    missing = [n for first, last in gaps(whole, size) for n in range(first, last + 1)]
    assert missing == [n for n in range(size) if n not in done]


async def test_journal_cut_in_a_line_keeps_what_it_tells_before(tmp_path):
    tree = Tree.open(str(tmp_path))
    part = await claim(tree, "key", 100, 0.01)
    part.write(0, [b"a" * 10, b"b" * 10])
    part.write(50, [b"c" * 10])
    part.close()
    journal = tmp_path / "key.journal"
    journal.write_bytes(journal.read_bytes()[:-2])
    part = await claim(tree, "key", 100, 0.01)
    assert part.missing == [(20, 99)]
    part.write(20, [b"d" * 5])
    part.close()
    assert read_journal(tree, "key", 100) == [(0, 24)]
    assert read_journal(tree, "key", 101) == [], "another content's part"
    (tmp_path / "key.part").write_bytes(b"")
    assert read_journal(tree, "key", 100) == [], "the part lost its bytes"
    tree.close()


async def test_part_written_in_odd_pieces(tmp_path):
    tree = Tree.open(str(tmp_path))
    part = await claim(tree, "key", 3000, 0.01)
    assert part.write(0, [b"x"] * 3000) == 3000
    part.finish()
    part.close()
    assert (tmp_path / "key").read_bytes() == b"x" * 3000
    assert await claim(tree, "key", 3000, 0.01) is None
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    tree.close()


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("5", 5, 5),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-3", 0, 0),
        ("nan", 0, 0),
        ("1e9", 300, 300),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 300, 300),
    ],
)
def test_retry_after_in_every_form(value, low, high):
    assert low <= retry_after_s(value) <= high


@pytest.mark.parametrize(
    ("path", "include", "exclude", "expected"),
    [
        ("a/b.json", [], [], True),
        ("a/b.json", ["*.json"], [], True),
        ("a/b.json", ["*.bin"], [], False),
        ("a/b.json", ["a/"], [], True),
        ("a/b.json", [], ["a/*"], False),
        ("A.JSON", ["*.json"], [], False),
    ],
)
def test_patterns(path, include, exclude, expected):
    assert wanted(path, include, exclude) is expected
