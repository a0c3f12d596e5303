"""A broken folder says everything that is wrong with it, where, and how to mend it; and no secret."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.snapshot.errors import PolicyError, PolicyErrors
from extproc.snapshot.files import MAX_FILE_BYTES, load_folder
from tests.snapshot.conftest import PolicyFolder, endpoint, quota, token

SECRET = "sk-Zq7-very-secret"


def faults(folder: PolicyFolder) -> tuple[PolicyError, ...]:
    with pytest.raises(PolicyErrors) as caught:
        load_folder(folder.path)
    return caught.value.errors


def only(folder: PolicyFolder) -> PolicyError:
    (error,) = faults(folder)
    return error


def test_all_faults_of_all_files_are_told_at_once(folder):
    folder.write("a.yaml", endpoint(), token(rpm=-1).replace("type: rpm", "type: rpx"))
    folder.write("b.yml", "a: [\n")
    folder.write("c.json", '{"apiVersion": "arks.ai/v1", "kind": "ArksQuota", "metadata": {"name": "q"}, "spec": {}}')
    found = {(error.file, error.line, error.path) for error in faults(folder)}
    assert found == {
        ("a.yaml", 20, "spec.qos[0].rateLimits[0].type"),
        ("a.yaml", 21, "spec.qos[0].rateLimits[0].value"),
        ("b.yml", 2, ""),
        ("c.json", 1, "spec.quotas"),
    }


@pytest.mark.parametrize(
    ("change", "line", "path", "problem", "fix"),
    [
        (("value: 5", "value: '5'"), 12, "spec.qos[0].rateLimits[0].value", "whole number", "quotes"),
        (("value: 5", "value: yes"), 12, "spec.qos[0].rateLimits[0].value", "whole number", ""),
        (("  token: sk-alice", "  token: 12345"), 6, "spec.token", "must be text", "quotes"),
        (("rateLimits:", "rateLimit:"), 10, "spec.qos[0].rateLimit", "not a known field", "rateLimits"),
        (("spec:", "specs:"), 1, "spec", "is required", ""),
        (("  name: alice", "  name: Alice_1"), 4, "metadata.name", "form", ""),
        (("  token: sk-alice", "  tokenHash: sha256:abc"), 6, "spec.tokenHash", "form", ""),
        (("  token: sk-alice", "  token: a\n  tokenHash: sha256:" + "0" * 64), 5, "spec", "exactly one of", ""),
        (("  token: sk-alice\n", ""), 5, "spec", "exactly one of", ""),
        (("  token: sk-alice", "  token: a\n  expiresAt: 2027-01-31"), 7, "spec.expiresAt", "RFC 3339", ""),
        (("  token: sk-alice", "  token: a\n  expiresAt: 2027-01-31T00:00:00"), 7, "spec.expiresAt", "with a zone", ""),
        (
            ("  token: sk-alice", "  token: a\n  maxConcurrentRequests: 0"),
            7,
            "spec.maxConcurrentRequests",
            "at least 1",
            "",
        ),
        (("arks.ai/v1", "arks.ai/v2"), 1, "apiVersion", "unknown version", "arks.ai/v1"),
        (("arks.ai/v1", "ark.ai/v1"), 1, "apiVersion", "unknown version", "arks.ai/v1"),
        (("kind: ArksToken", "kind: ArksTokens"), 2, "kind", "no kind of arks.ai", "ArksToken?"),
        (("kind: ArksToken", "kind: arkstoken"), 2, "kind", "no kind of arks.ai", "ArksToken?"),
        (("kind: ArksToken\n", ""), 1, "kind", "required", ""),
        (
            ("    - arksEndpoint:\n        name: qwen", "    - arksEndpoint: qwen"),
            8,
            "spec.qos[0].arksEndpoint",
            "mapping",
            "",
        ),
        (("  qos:", "  qos: 5\n  priority:"), 7, "spec.qos", "list", ""),
        (("value: 5", "value: 5\n          value: 6"), 13, "spec.qos[0].rateLimits[0].value", "twice", ""),
        (("value: 5", f"value: {2**63}"), 12, "spec.qos[0].rateLimits[0].value", "at most", ""),
    ],
)
def test_the_offending_field_is_named(folder, change, line, path, problem, fix):
    folder.write("t.yaml", token().replace(*change))
    found = {(error.line, error.path): error for error in faults(folder)}
    assert (line, path) in found, found
    assert problem in found[line, path].problem
    assert fix in found[line, path].fix


def test_lines_count_from_the_files_begin(folder):
    folder.write("t.yaml", "# two\n# lines\n", endpoint(), quota(), token(rpm=-1))
    text = (folder.path / "t.yaml").read_text().splitlines()
    error = only(folder)
    assert text[error.line - 1].strip() == "value: -1"


def test_a_list_as_kubectl_prints_it_is_looked_into(folder):
    item = "\n".join("    " + line for line in token(rpm=-1).splitlines()).replace(
        "    apiVersion", "  - apiVersion", 1
    )
    folder.write("t.yaml", f"apiVersion: v1\nkind: List\nitems:\n{item}\n")
    error = only(folder)
    assert (error.line, error.path) == (15, "items[0].spec.qos[0].rateLimits[0].value")


def test_two_documents_for_one_object_name_both_places(folder):
    folder.write("a.yaml", endpoint(), token())
    folder.write("b.yaml", token(secret="sk-other"))
    error = only(folder)
    assert (error.file, error.line, error.path) == ("b.yaml", 4, "metadata.name")
    assert "a.yaml:13" in error.problem


def test_default_is_the_namespace_that_is_meant_where_none_is_named(folder):
    folder.write("a.yaml", token(), token().replace("  name: alice", "  name: alice\n  namespace: default"))
    assert "already at" in only(folder).problem


def test_a_missing_secret_is_told_at_its_reference(folder):
    folder.write("a.yaml", endpoint(), token().replace("token: sk-alice", "tokenSecretRef: {name: vault, key: k}"))
    error = only(folder)
    assert (error.file, error.line, error.path) == ("a.yaml", 15, "spec.tokenSecretRef.name")
    assert "vault" in error.problem


@pytest.mark.parametrize("data", ["data: {other: eA==}", "stringData: {k: ''}", 'stringData: {k: "\\n"}'])
def test_a_secret_without_the_value_is_told(folder, data):
    folder.write("a.yaml", token().replace("token: sk-alice", "tokenSecretRef: {name: vault, key: k}"))
    folder.write("s.yaml", f"apiVersion: v1\nkind: Secret\nmetadata: {{name: vault}}\n{data}\n")
    assert only(folder).path == "spec.tokenSecretRef.key"


def test_secret_data_that_is_no_base64_is_told_without_it(folder):
    folder.write("s.yaml", f"apiVersion: v1\nkind: Secret\nmetadata: {{name: vault}}\ndata:\n  key: {SECRET}!\n")
    error = only(folder)
    assert (error.line, error.path) == (5, "data.key")
    assert "base64" in error.problem
    assert SECRET not in str(error)


def test_a_file_too_large_a_pipe_and_a_dangling_link_are_faults_of_their_files_only(folder):
    folder.write("good.yaml", endpoint())
    with (folder.path / "large.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    os.mkfifo(folder.path / "pipe.yaml")
    (folder.path / "gone.yaml").symlink_to(folder.path / "nowhere")
    (folder.path / "sub.yaml").mkdir()
    assert sorted(error.file for error in faults(folder)) == ["gone.yaml", "large.yaml", "pipe.yaml", "sub.yaml"]


def test_one_endless_document_is_refused_and_the_next_is_still_looked_at(folder):
    folder.write("a.yaml", "a:\n" + "  - xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n" * 40_000, token(rpm=-1))
    errors = faults(folder)
    assert [(error.line, error.path) for error in errors] == [(1, ""), (40014, "spec.qos[0].rateLimits[0].value")]


def test_no_folder_is_told(tmp_path: Path):
    with pytest.raises(PolicyErrors, match="cannot be listed"):
        load_folder(tmp_path / "nowhere")


def test_a_thousand_faults_make_a_short_text(folder):
    folder.write("a.yaml", *(token(name=f"t{i}", rpm=-1) for i in range(1000)))
    with pytest.raises(PolicyErrors) as caught:
        load_folder(folder.path)
    assert len(caught.value.errors) == 1000
    assert str(caught.value).endswith("and 950 more")
    assert str(caught.value).count("\n") == 50


_BACKEND = """\
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: Backend
metadata: {name: be}
spec:
  endpoints:
    - ip: {address: 10.0.0.1, port: 80}
"""
_VAULT = f"apiVersion: v1\nkind: Secret\nmetadata: {{name: vault}}\nstringData: {{k: {SECRET}2}}\n"
_BASE = "---\n".join(
    [
        endpoint(extra="  routeConfigs:\n    - {group: gateway.envoyproxy.io, kind: Backend, name: be}\n"),
        quota(),
        token(secret=f'"{SECRET}"', quota="basic"),
        _BACKEND,
        token(name="bob").replace("token: sk-alice", "tokenSecretRef: {name: vault, key: k}"),
        _VAULT,
    ]
)


def test_the_text_that_is_mutilated_below_is_whole(folder):
    folder.write("p.yaml", _BASE)
    assert len(load_folder(folder.path).policy.tokens) == 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 6))
def test_a_mutilated_file_is_a_policy_or_faults_with_file_and_line(folder, seed, cuts):
    chance = random.Random(seed)
    text = bytearray(_BASE.encode())
    for _ in range(cuts):
        if not text:
            break
        at = chance.randrange(len(text))
        match chance.randrange(5):
            case 0:
                del text[at : at + chance.randrange(1, 30)]
            case 1:
                text[at:at] = chance.choice(
                    [b":", b"- ", b"[", b"{", b"\n", b"&a ", b"*a ", b"'", b'"', b"\t", b"!x ", b"\xff"]
                )
            case 2:
                text[at] = chance.randrange(256)
            case 3:
                other = chance.randrange(len(text))
                text[at:at] = text[other : other + 40]
            case 4:
                del text[max(1, at) :]
    (folder.path / "p.yaml").write_bytes(text)
    try:
        load_folder(folder.path)
    except PolicyErrors as caught:
        lines = text.count(b"\n") + text.count(b"\r") + 3
        for error in caught.errors:
            assert error.file == "p.yaml"
            assert 1 <= error.line <= lines
            assert error.problem
            assert SECRET not in str(error)
