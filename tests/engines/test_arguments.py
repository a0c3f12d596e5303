"""Whose option wins, and what becomes of entries that were written for a shell."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from controller.engines import sglang, vllm
from controller.engines.arguments import merge, option_value, split_entries, without_option

WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=20)
VALUES = WORDS.filter(lambda text: text[0] not in "-'\"" and text.strip() == text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4))
@settings(max_examples=60)
def test_a_json_value_arrives_as_it_was_written(value):
    text = json.dumps(value)
    assert split_entries(["--override-generation-config", text])[1] == text
    assert split_entries([f"--override-generation-config {text}"]) == ("--override-generation-config", text)
    glued = f"--override-generation-config={text}"
    assert split_entries([glued]) == (glued,)


@given(st.lists(VALUES, max_size=6))
@settings(max_examples=60)
def test_separate_arguments_stay_separate_and_whole(values):
    entries = [part for value in values for part in ("--flag", value)]
    assert split_entries(entries) == tuple(entries)


def test_entries_written_for_arks_shell_line_still_mean_the_same():
    assert split_entries(["--max-model-len 32768 --dtype half"]) == ("--max-model-len", "32768", "--dtype", "half")
    assert split_entries(["--kv-transfer-config", "'{\"a\": 1}'"]) == ("--kv-transfer-config", '{"a": 1}')
    assert split_entries(["--chat-template='/models/a b.jinja'"]) == ("--chat-template=/models/a b.jinja",)
    assert split_entries(["--x", "7 --y 8"]) == ("--x", "7", "--y", "8")
    assert split_entries(["--chat-template", "say hello to me"]) == ("--chat-template", "say hello to me")


def test_shell_names_become_names_that_the_kubelet_expands_and_no_others():
    names = frozenset({"MY_DIR"})
    assert split_entries(["--download-dir", "$MY_DIR/x", "${MY_DIR}"], names) == (
        "--download-dir",
        "$(MY_DIR)/x",
        "$(MY_DIR)",
    )
    assert split_entries(["--price", "$OTHER"], names) == ("--price", "$OTHER")


def test_a_command_substitution_is_only_text():
    assert split_entries(["--served-model-name", "$(rm -rf /)"], frozenset({"A"}))[1] == "$(rm -rf /)"
    assert "; touch /tmp/x" in split_entries(["--served-model-name", "; touch /tmp/x"])


def test_every_spelling_of_tensor_parallelism_beats_ours():
    ours = [("--tensor-parallel-size", "1"), ("--port", "8080")]
    for spelling in (["-tp", "4"], ["--tp=4"], ["--tp-size", "4"], ["--tensor_parallel_size=4"]):
        assert merge(ours, spelling, vllm.ALIASES) == ("--port", "8080", *spelling)
    assert merge([("--tp-size", "1")], ["--tensor-parallel-size", "2"], sglang.ALIASES) == (
        "--tensor-parallel-size",
        "2",
    )


def test_a_negated_boolean_beats_ours():
    assert merge([("--enable-lora",)], ["--no-enable-lora"], vllm.ALIASES) == ("--no-enable-lora",)


def test_negative_numbers_are_values_and_no_options():
    assert merge([("--seed", "0")], ["--x", "-1"], {}) == ("--seed", "0", "--x", "-1")


@given(st.lists(st.tuples(st.sampled_from(["--a", "--b", "--c"]), VALUES), max_size=6))
@settings(max_examples=60)
def test_the_users_arguments_are_kept_verbatim_at_the_end_and_none_of_ours_contradicts_them(pairs):
    user = tuple(part for pair in pairs for part in pair)
    merged = merge([("--a", "ours"), ("--d", "ours")], user, {})
    assert merged[len(merged) - len(user) :] == user
    given_names = {name for name, _ in pairs}
    assert "ours" in merged[: len(merged) - len(user)]
    assert ("--a" in merged[:2]) == ("--a" not in given_names)


def test_the_last_value_counts_and_can_be_taken_out():
    tokens = ("--model", "a", "--model=b", "--headless")
    assert option_value(tokens, "model", vllm.ALIASES) == "b"
    assert without_option(tokens, "model", vllm.ALIASES) == ("--headless",)
    assert option_value(tokens, "port", vllm.ALIASES) is None
