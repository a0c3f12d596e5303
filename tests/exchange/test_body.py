"""Request bodies: what is refused, what is found, and that an edit leaves every other byte alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import body as bodies
from extproc.errors import Refused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECT = st.dictionaries(st.text(), JSON, max_size=6)
STYLE = st.sampled_from(
    [
        {"separators": (",", ":")},
        {},
        {"indent": 2},
        {"indent": "\t", "ensure_ascii": False},
        {"separators": (" , ", " : ")},
    ]
)


def raw(value):
    return {name: bytes(part) for name, part in value.items()}


@given(OBJECT, STYLE)
def test_every_valid_object_is_split_into_its_fields(value, style):
    body = json.dumps(value, **style).encode("utf-8", "surrogatepass")
    fields = bodies.parse(body)
    try:
        body.decode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        return
    assert not isinstance(fields, Refused)
    assert {name: json.loads(bytes(part)) for name, part in fields.items()} == value
    found = list(bodies.spans(body))
    assert [span.name for span in found] == list(value)
    assert [json.loads(body[span.value : span.end]) for span in found] == list(value.values())


@given(OBJECT, STYLE, st.data())
def test_a_field_said_twice_is_refused_in_any_style(value, style, data):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        return
    name = data.draw(st.sampled_from([*value, "model"]))
    pairs = [*value.items(), (name, 1)]
    comma, colon = style.get("separators", (", ", ": "))
    inner = comma.join(json.dumps(k) + colon + json.dumps(v, **style) for k, v in pairs)
    fields = bodies.parse(("{" + inner + "}").encode())
    assert isinstance(fields, Refused) == (name in value)
    if isinstance(fields, Refused):
        assert fields.reason.code == "duplicate_field"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"a":\xff}', "invalid_json"),
        (b'{"a":"\xff"}', "invalid_json"),
        (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", None),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "invalid_json"),
        (b'{"a":1}x', "invalid_json"),
        (b'{"a":1,"a":2}', "duplicate_field"),
        (b'{"a":1,"\\u0061":2}', "duplicate_field"),
        # As long as without the second "a", but with all blanks that Python's JSON has.
        (b'{"a": 1,"b":2,"c":3,"d":4,"e":5,"a":6  }', "duplicate_field"),
    ],
)
def test_what_is_refused(body, code):
    fields = bodies.parse(body)
    if code is None:
        # Deep but within what the parser bears: passed on or refused, never an exception.
        assert isinstance(fields, Refused | dict)
    else:
        assert isinstance(fields, Refused)
        assert fields.reason.code == code


def test_a_refusal_never_shows_the_body():
    secret = "sk-secret"
    for body in (f'{{"a":{secret}}}', f'{{"{secret * 20}":1,"{secret * 20}":2}}', f'["{secret}"]', f'"{secret}'):
        answer = bodies.parse(body.encode())
        assert isinstance(answer, Refused)
        assert secret not in answer.message


@given(OBJECT, STYLE)
def test_adding_a_field_leaves_every_other_byte(value, style):
    body = json.dumps(value, **style).encode("utf-8", "surrogatepass")
    fields = bodies.parse(body)
    if "stream_options" in value or isinstance(fields, Refused):
        return
    edited = bodies.edit(body, fields, put={"stream_options": {"include_usage": True}})
    assert json.loads(edited) == {**value, "stream_options": {"include_usage": True}}
    head = body[: body.rindex(b"}")]
    assert edited.startswith(head)
    assert edited.endswith(body[body.rindex(b"}") :])


@given(OBJECT, STYLE, st.data())
def test_removing_and_replacing_keep_the_other_fields_text(value, style, data):
    body = json.dumps(value, **style).encode("utf-8", "surrogatepass")
    fields = bodies.parse(body)
    if isinstance(fields, Refused):
        return
    names = list(value)
    gone = frozenset(data.draw(st.sets(st.sampled_from(names)))) if names else frozenset()
    put = {name: "new" for name in data.draw(st.sets(st.sampled_from([*names, "added"]))) if name not in gone}
    edited = bodies.edit(body, fields, remove=gone, put=put)
    expected = {name: part for name, part in value.items() if name not in gone} | put
    assert json.loads(edited) == expected
    left = bodies.parse(edited)
    assert not isinstance(left, Refused)
    for name, part in raw(fields).items():
        if name not in gone and name not in put:
            assert bytes(left[name]) == part


@pytest.mark.parametrize(
    ("field", "value", "ok"),
    [
        ("max_tokens", "1", True),
        ("max_tokens", "null", True),
        ("max_tokens", "0", False),
        ("max_tokens", "-1", False),
        ("max_tokens", "1.5", False),
        ("max_tokens", '"7"', False),
        ("max_tokens", "99999999999999999999", False),
        ("max_completion_tokens", "true", False),
        ("max_output_tokens", "10", True),
        ("n", "129", False),
        ("n", "128", True),
        ("best_of", "[]", False),
    ],
)
def test_counts(field, value, ok):
    fields = bodies.parse(f'{{"{field}":{value}}}'.encode())
    fault = bodies.check_counts(fields)
    assert (fault is None) is ok
    if fault is not None:
        assert fault.param == field
        assert field in fault.message


@pytest.mark.parametrize(
    ("value", "wants"),
    [
        ("null", False),
        ("{}", False),
        ('{"include_usage":true}', True),
        ('{"include_usage":false}', False),
        ('{"include_usage":null}', False),
        ("[]", None),
        ('{"include_usage":1}', None),
        ('"x"', None),
    ],
)
def test_stream_options(value, wants):
    found = bodies.wants_usage(bodies.parse(f'{{"stream_options":{value}}}'.encode()))
    if wants is None:
        assert isinstance(found, Refused)
        assert found.param == "stream_options"
    else:
        assert found is wants
    kept = bodies.parse(b'{"stream_options":{"continuous_usage_stats":true}}')
    assert bodies.stream_options_with_usage(kept) == {"continuous_usage_stats": True, "include_usage": True}
