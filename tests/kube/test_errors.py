"""Refusals keep their meaning and lose the values that they quote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.kube.errors import ApiError, InvalidError, UnavailableError, api_error, struck_out

secrets = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=12, max_size=40)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (
            'Pear "a" is invalid: spec.color: Too long: may not be more than 20 bytes',
            'Pear "a" is invalid: spec.color: Too long: may not be more than 20 bytes',
        ),
        ('spec.token: Invalid value: "sk-1: 2": must match', "spec.token: Invalid value: <hidden>: must match"),
        ("spec.size: Invalid value: 12: must be less", "spec.size: Invalid value: <hidden>: must be less"),
        ('spec: Invalid value: {"token":"sk-1"}: no', "spec: Invalid value: <hidden>: no"),
        ('a: Duplicate value: "sk-1"', "a: Duplicate value: <hidden>"),
        (
            'a: Unsupported value: "sk-1": supported values: "x", "y"',
            'a: Unsupported value: <hidden>: supported values: "x", "y"',
        ),
        (
            '[a: Invalid value: "s1": no, b: Invalid value: "s2": no]',
            "[a: Invalid value: <hidden>: no, b: Invalid value: <hidden>: no]",
        ),
    ],
)
def test_quoted_values_are_struck_out(said: str, left: str) -> None:
    assert struck_out(said) == left


@given(secrets, st.sampled_from(["Invalid value", "Duplicate value", "Unsupported value"]))
def test_no_quoted_string_survives(secret: str, what: str) -> None:
    message = f"spec.token: {what}: {json.dumps(secret, ensure_ascii=False)}: must be shorter"
    assert secret not in str(api_error(422, json.dumps({"message": message}).encode()))


@given(st.integers(400, 599), st.binary(max_size=60))
def test_whatever_a_proxy_answers_is_an_api_error(status: int, body: bytes) -> None:
    error = api_error(status, body, {"Retry-After": "soon"})
    assert isinstance(error, ApiError)
    assert error.status == status


def test_what_no_apply_can_hold_is_ours_and_other_500s_are_theirs() -> None:
    unknown = json.dumps({"message": "failed to create typed patch object: .spec.x: field not declared in schema"})
    assert isinstance(api_error(500, unknown.encode()), InvalidError)
    twice = json.dumps({"message": 'failed to create typed patch object: .env: duplicate entries for key [name="A"]'})
    assert isinstance(api_error(500, twice.encode()), InvalidError)
    assert isinstance(api_error(500, b'{"message":"etcdserver: leader changed"}'), UnavailableError)
