"""What the YAML reader takes, and that nothing it is fed costs more than an error."""

import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.snapshot.yamltree import MAX_DOCUMENT_BYTES, YAMLFault, documents


def values(text: str | bytes) -> list:
    return [document.value for document in documents(text.encode() if isinstance(text, str) else text)]


def fault(text: str | bytes) -> YAMLFault:
    with pytest.raises(YAMLFault) as caught:
        values(text)
    return caught.value


def test_lines_of_every_field():
    (document,) = documents(b"# a\na: 1\nb:\n  - c: x\n    d: |\n      long\n      text\n    e: y\n  -\n    - 1\n")
    assert document.value == {"a": 1, "b": [{"c": "x", "d": "long\ntext\n", "e": "y"}, [1]]}
    lines = {".".join(map(str, path)): line for path, line in document.lines.items()}
    assert lines["a"] == 1
    assert lines["b"] == 2
    assert lines["b.0.c"] == 3
    assert lines["b.0.d"] == 4
    assert lines["b.0.e"] == 7
    assert lines["b.1.0"] == 9


def test_scalars_are_read_as_kubernetes_reads_them():
    text = (
        "{a: 1, b: '1', c: true, d: yes, e: 1.5, f: 1e3, g: 0x1F, h: 2027-01-31T00:00:00Z, "
        "i: 12:30, j: ~, k: '', l: -7}"
    )
    assert values(text) == [
        {
            "a": 1,
            "b": "1",
            "c": True,
            "d": True,
            "e": 1.5,
            "f": 1000.0,
            "g": 31,
            "h": "2027-01-31T00:00:00Z",
            "i": "12:30",
            "k": "",
            "l": -7,
        }
    ]


def test_a_null_field_is_an_absent_field():
    assert values("a:\nb: null\nc: 1\n") == [{"c": 1}]


def test_aliases_repeat_their_value():
    assert values("a: &x {b: [1, 2]}\nc: *x\n") == [{"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}]


@pytest.mark.parametrize(
    ("text", "line", "path", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 2, ("a",), "twice"),
        ("a:\n  b:\n  b: 1\n", 2, ("a", "b"), "twice"),
        ("a: *nothing\n", 0, ("a",), "alias"),
        ("a: &x [1, *x]\n", 0, ("a", 1), "alias"),
        ("a: !!python/object:os.system {}\n", 0, ("a",), "tag"),
        ("a: !secret x\n", 0, ("a",), "tag"),
        ("a: {b: 1}\nc:\n  <<: {d: 1}\n", 2, ("c",), "merge"),
        ("? [a]\n: b\n", 0, (), "no string"),
        ("a: b: c\n", 0, (), "not valid YAML"),
        ("a: 'open\n", 1, (), "not valid YAML"),
        ("\ta: 1\n", 0, (), "not valid YAML"),
    ],
)
def test_faults_say_where(text, line, path, problem):
    found = fault(text)
    assert (found.line, found.path) == (line, path)
    assert problem in found.problem


def test_a_billion_laughs_is_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    began_s = time.process_time()
    assert "values" in fault(bomb).problem
    assert time.process_time() - began_s < 5


@pytest.mark.parametrize("opening", [b"[", b"- ", b"{a: ", b"? "])
def test_deep_nesting_is_refused_and_does_not_end_the_process(opening):
    # PyYAML's own composer overflows the C stack on these.
    assert fault(opening * 100_000).line == 0


def test_more_than_an_object_may_hold_is_refused():
    assert "larger" in fault(b"a: " + b"x" * MAX_DOCUMENT_BYTES).problem


@pytest.mark.parametrize("text", [b"a: \xff\xfe", b"a: \x00", b"\x80", b"a: \xed\xa0\x80"])
def test_bytes_that_are_no_text_are_a_fault(text):
    assert isinstance(fault(text), YAMLFault)


_PLAIN = st.recursive(
    st.one_of(
        st.integers(-(2**63), 2**63),
        st.booleans(),
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcXYZ_-19", min_size=1), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), _PLAIN, max_size=5), st.booleans())
@example({"a": ["1.", "0o7", "+.5", "1e5", "0b1", ".", "-", "+", "", "~", "null", "<<", "=", "1_000"]}, False)
def test_what_pyyaml_writes_is_read_back(value, flow):
    # Quoted, with tags where the value is no text: PyYAML and Kubernetes see different numbers in plain scalars.
    text = yaml.safe_dump(value, default_flow_style=flow, default_style='"', allow_unicode=True)
    assert values(text) == [value]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text("-:?[]{},&*!|>'\"%@`# \n\tabc01<", max_size=60).map(str.encode))
def test_garbage_is_values_or_a_fault(text):
    try:
        values(text)
    except YAMLFault as found:
        line = found.line
    else:
        line = 0
    assert 0 <= line <= text.count(b"\n") + text.count(b"\r") + 5
