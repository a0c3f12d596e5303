"""Answers in one JSON document: every engine's usage, whatever the cut, size and shape."""

import gzip
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.usage.body import BODY_MAX, BlindTap, JsonTap
from extproc.usage.encoded import DecodingTap
from extproc.usage.model import Usage
from extproc.usage.sse import SseTap
from extproc.usage.taps import make_tap
from tests.usage.strategies import CUTS, as_json, cut, findings, follow


def json_tap(api, encoding=""):
    return make_tap(api, stream=False, content_type="application/json", content_encoding=encoding, hide_usage=True)


VLLM = {"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": None}
SHAPES = [
    ("chat", {"choices": [{"message": {"content": '"usage":{"prompt_tokens":9}'}}], "usage": VLLM}, Usage(7, 5)),
    ("chat", {"usage": VLLM | {"prompt_tokens_details": {"cached_tokens": 4, "created": 0}}}, Usage(7, 5, 4)),
    ("chat", {"usage": VLLM | {"completion_tokens_details": {"reasoning_tokens": 3}}}, Usage(7, 5, 0, 3)),
    ("chat", {"usage": VLLM | {"reasoning_tokens": 2}}, Usage(7, 5, 0, 2)),
    ("chat", {"usage": VLLM | {"completion_tokens": 5.0, "prompt_tokens_details": "odd"}}, Usage(7, 5)),
    ("chat", {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}, Usage(0, 0)),
    ("chat", {"usage": None}, None),
    ("chat", {"usage": {}}, None),
    ("chat", {"choices": []}, None),
    ("completions", {"choices": [{"text": "a"}], "usage": VLLM}, Usage(7, 5)),
    ("embeddings", {"data": [[0.1]], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}, Usage(7, 0)),
    ("embeddings", {"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}, Usage(7, 0)),
    ("rerank", {"results": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0)),
    ("rerank", {"results": [], "usage": {"total_tokens": 9}}, Usage(9, 0)),
    ("score", {"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0)),
    (
        "responses",
        {
            "status": "completed", "error": None,
            "usage": {
                "input_tokens": 7, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 5,
                "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 12,
            },
        },
        Usage(7, 5, 4, 1),
    ),
    ("messages", {"type": "message", "usage": {"input_tokens": 7, "output_tokens": 5}}, Usage(7, 5)),
    (
        "messages",
        {"usage": {"input_tokens": 31, "cache_creation_input_tokens": 128, "output_tokens": 5}},
        Usage(159, 5),
    ),
    ("messages", {"usage": {"input_tokens": 3, "cache_read_input_tokens": 24, "output_tokens": 0}}, Usage(27, 0, 24)),
    ("count_tokens", {"input_tokens": 7}, Usage(0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("api", "body", "usage"), SHAPES)
def test_usage_of_every_shape(api, body, usage):
    tap = json_tap(api)
    data = as_json(body)
    assert follow(tap, [data]) == data
    assert (tap.usage, tap.error, tap.done, tap.started, tap.final) == (usage, "", True, True, usage is not None)


def test_a_failure_to_count_tokens_has_no_usage():
    tap = json_tap("count_tokens")
    follow(tap, [as_json({"type": "error", "error": {"type": "api_error", "message": "m"}})])
    assert (tap.usage, tap.error) == (None, "engine_error")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SHAPES), CUTS, st.booleans(), st.booleans())
def test_the_cut_changes_nothing(shape, places, compressed, separate_end):
    api, body, usage = shape
    data = gzip.compress(as_json(body)) if compressed else as_json(body)
    tap = json_tap(api, "gzip" if compressed else "")
    assert follow(tap, cut(data, places), separate_end=separate_end) == data
    assert (tap.usage, tap.done, tap.decodes) == (usage, True, False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            {"error": {"message": "m", "type": "BadRequestError", "param": "input_tokens", "code": 400}},
            "engine_refused",
        ),
        ({"error": {"type": "Service Unavailable", "code": 503}}, "engine_overloaded"),
        ({"error": "Unauthorized"}, "engine_error"),
        ({"object": "error", "message": "m", "type": "BadRequest", "param": None, "code": 400}, "engine_refused"),
        ({"message": "Model x not ready", "type": "service_unavailable", "code": 503}, "engine_overloaded"),
        ({"type": "error", "error": {"type": "not_found_error", "message": "m"}}, "engine_refused"),
        ({"detail": "Not Found"}, "engine_refused"),
        ({"status": "failed", "error": {"code": "server_error"}, "usage": None}, "engine_error"),
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses", "messages", "embeddings"])
def test_error_bodies_have_a_stable_reason(api, body, reason):
    tap = json_tap(api)
    follow(tap, [as_json(body)])
    assert (tap.error, tap.usage) == (reason, None)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"Internal Server Error", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"usage":1}x']
)
def test_what_is_no_json_document_is_passed_on_and_not_done(body):
    tap = json_tap("chat")
    assert follow(tap, [body]) == body
    assert (tap.usage, tap.error, tap.done) == (None, "", False)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), CUTS, st.sampled_from(["chat", "messages", "responses", "score"]))
def test_garbage_never_raises(body, places, api):
    assert follow(json_tap(api), cut(body, places)) == body


def test_vectors_beyond_the_bound_are_not_kept_and_usage_is_found():
    tap = JsonTap("embeddings")
    tap.feed(b'{"object":"list","data":[', False)
    row = as_json({"embedding": [0.123456] * 1000, "usage": {"prompt_tokens": 1}}) + b","
    for _ in range(3 * BODY_MAX // len(row)):
        tap.feed(row, False)
        assert sum(map(len, tap._parts)) <= BODY_MAX + len(row)
    tap.feed(b'{}],"usage" : {"prompt_tokens":77,"total_tokens":77,"prompt_tokens_details":{"cached_tokens":5}}}', True)
    assert (tap.usage, tap.done, tap.final) == (Usage(77, 0, 5), True, True)


def test_a_long_body_without_usage_has_none():
    tap = JsonTap("embeddings")
    follow(tap, [b'{"data":"' + b"x" * BODY_MAX + b'\\"usage"}'])
    assert (tap.usage, tap.done) == (None, False)


def test_a_client_that_left_during_a_body_is_charged_its_bytes():
    tap = json_tap("chat")
    assert tap.delivered_tokens() == 0
    tap.feed(b'{"choices":[{"message":{"content":"' + b"word" * 100, False)
    assert 100 <= tap.delivered_tokens() <= 120
    embeddings = json_tap("embeddings")
    embeddings.feed(b"[" * 100, False)
    assert embeddings.delivered_tokens() == 0


@pytest.mark.parametrize(
    ("stream", "content_type", "encoding", "kind"),
    [
        (True, "text/event-stream; charset=utf-8", "", SseTap),
        (False, "Text/Event-Stream", "identity", SseTap),
        (None, "text/event-stream", "", SseTap),
        (True, "application/json", "", JsonTap),
        (True, "application/problem+json", "", JsonTap),
        (True, "", "", SseTap),
        (None, "", "", JsonTap),
        (False, "application/json", "GZIP", DecodingTap),
        (True, "text/event-stream", "br", BlindTap),
        (True, "text/html", "", BlindTap),
        (False, "audio/mpeg", "gzip", BlindTap),
    ],
)
def test_headers_choose_the_tap(stream, content_type, encoding, kind):
    tap = make_tap("chat", stream=stream, content_type=content_type, content_encoding=encoding, hide_usage=False)
    assert type(tap) is kind


def test_a_blind_tap_passes_everything():
    tap = make_tap("chat", stream=False, content_type="text/html", content_encoding="", hide_usage=True)
    assert tap.feed(b"<html>", True) is None
    assert findings(tap) == (None, "", True, False, False, 0)


def test_a_small_piece_that_unpacks_to_a_thousand_times_its_size_is_not_held():
    data = gzip.compress(b" " * (32 << 20))
    tap = json_tap("chat", "gzip")
    tracemalloc.start()
    try:
        assert tap.feed(data, True) is None
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20
