"""Single behaviours of the stream tap: holding back, hiding, bounds, first content, errors of every shape."""

import json
import sys

import pytest

from extproc.usage.model import Usage
from extproc.usage.sse import EVENT_MAX, HOLD_MAX, SseTap
from tests.usage.transcripts import compact

CONTENT = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'


def read(api, *events, hide=False):
    tap = SseTap(api, hide_usage=hide)
    for event in events:
        tap.feed(b"data: " + compact(event).encode() + b"\n\n", False)
    return tap


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields}]}


def test_a_complete_content_event_is_never_delayed():
    tap = SseTap("chat", hide_usage=True)
    assert tap.feed(CONTENT, False) is None
    assert tap.feed(CONTENT + CONTENT[:20], False) == CONTENT
    assert tap.feed(CONTENT[20:] + USAGE[:-1], False) == CONTENT
    assert tap.feed(USAGE[-1:] + b"data: [DONE]\n\n", False) == b"data: [DONE]\n\n"
    assert tap.usage == Usage(3, 2)
    assert tap.final
    assert tap.done


def test_nothing_is_held_back_where_nothing_is_hidden():
    tap = SseTap("chat", hide_usage=False)
    for at in range(len(USAGE)):
        assert tap.feed(USAGE[at : at + 1], False) is None
    assert tap.usage == Usage(3, 2)


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_apis_that_always_send_usage_are_never_changed(api):
    tap = SseTap(api, hide_usage=True)
    assert tap.feed(USAGE[:9], False) is None
    assert tap.feed(USAGE[9:], False) is None


def test_the_line_feed_behind_a_hidden_event_goes_with_it():
    tap = SseTap("chat", hide_usage=True)
    crlf = USAGE.replace(b"\n", b"\r\n")
    assert tap.feed(crlf[:-1], False) == b""
    assert tap.feed(b"\n", False) == b""
    assert tap.feed(CONTENT, False) is None
    assert tap.feed(b"\n", False) is None


def test_an_event_that_is_too_long_to_hold_is_passed_on_however_it_is_cut():
    event = USAGE.replace(b"[]", b"[" + b" " * HOLD_MAX + b"]")
    whole, cut = SseTap("chat", hide_usage=True), SseTap("chat", hide_usage=True)
    assert whole.feed(event, False) is None
    out = b"".join(cut.feed(event[at : at + 1000], False) or b"" for at in range(0, HOLD_MAX, 1000))
    assert event.startswith(out)
    assert len(out) > HOLD_MAX - 2000
    assert whole.usage == Usage(3, 2)


def test_an_endless_event_is_not_collected():
    for hide in (False, True):
        tap = SseTap("chat", hide_usage=hide)
        piece = b"data: " + b"x" * (1 << 20)
        passed = 0
        for _ in range(EVENT_MAX // len(piece) + 8):
            out = tap.feed(piece, False)
            passed += len(piece) if out is None else len(out)
        assert passed == len(piece) * (EVENT_MAX // len(piece) + 8)
        assert sum(map(sys.getsizeof, tap._parts)) < 1000
        assert tap.feed(USAGE, False) is None
        assert tap.usage is None


def test_an_endless_event_in_one_piece_is_passed_and_not_read():
    body = b"data: " + b"x" * EVENT_MAX + b"\n\n" + USAGE
    tap = SseTap("chat", hide_usage=True)
    assert tap.feed(body, False) is None
    assert tap.usage is None


def test_a_large_event_in_small_pieces_costs_linear_time():
    tap = SseTap("chat", hide_usage=True)
    tap.feed(b"data: ", False)
    for _ in range(100_000):
        tap.feed(b"y" * 100, False)
    assert tap.feed(b"\n\n" + USAGE, False) == b"\n\n"
    assert tap.usage == Usage(3, 2)


def test_usage_beside_choices_stays_and_counts():
    tap = SseTap("chat", hide_usage=True)
    choice = b'{"index":0,"delta":{},"finish_reason":"stop"}'
    event = b'data: {"choices":[%b],"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n' % choice
    assert tap.feed(event, False) is None
    assert tap.usage == Usage(0, 0)
    assert not tap.final
    tap.feed(b"", True)
    assert tap.final


def test_an_error_with_empty_choices_is_shown():
    tap = SseTap("chat", hide_usage=True)
    body = b'data: {"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"m"}}\n\n'
    assert tap.feed(body, False) is None
    assert tap.error == "engine_error"


@pytest.mark.parametrize("bad", [-1, 1.5, "7", True, None, 2**60, [], {}, float("1e300")])
def test_numbers_that_are_no_counts_do_not_replace_usage(bad):
    good = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    tap = read("chat", good, {"choices": [], "usage": {"prompt_tokens": bad, "completion_tokens": 1}})
    assert tap.usage == Usage(3, 2)


def test_parts_never_exceed_their_whole():
    details = {"prompt_tokens_details": {"cached_tokens": 50}, "completion_tokens_details": {"reasoning_tokens": 50}}
    tap = read("chat", {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2.0} | details})
    assert tap.usage == Usage(3, 2, 3, 2)


@pytest.mark.parametrize(
    ("api", "before", "first"),
    [
        ("chat", [delta(role="assistant", content="")], delta(content="a")),
        ("chat", [delta()], delta(reasoning_content="hm")),
        ("chat", [], delta(reasoning="hm")),
        ("chat", [], delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}])),
        ("chat", [], delta(refusal="no")),
        ("chat", [{"choices": []}, {"choices": None}, {"choices": [7]}], delta(content=[{"text": "a"}])),
        ("completions", [{"choices": [{"text": ""}]}], {"choices": [{"text": "a"}]}),
        (
            "responses",
            [{"type": "response.created", "response": {}}],
            {"type": "response.output_text.delta", "delta": "a"},
        ),
        ("responses", [], {"type": "response.function_call_arguments.delta", "delta": "{"}),
        ("responses", [], {"type": "response.reasoning_text.delta", "delta": "hm"}),
        (
            "messages",
            [{"type": "message_start", "message": {}}],
            {"type": "content_block_delta", "delta": {"text": "a"}},
        ),
        ("messages", [{"type": "ping"}], {"type": "content_block_delta", "delta": {"partial_json": "{"}}),
    ],
)
def test_the_first_content_starts_the_answer_not_its_role(api, before, first):
    assert not read(api, *before).started
    tap = read(api, *before, first)
    assert tap.started
    assert tap.delivered_tokens() == 1


@pytest.mark.parametrize(
    ("api", "event", "reason"),
    [
        ("chat", {"error": {"message": "m", "type": "InternalServerError", "code": 500}}, "engine_error"),
        ("chat", {"error": "Unauthorized"}, "engine_error"),
        ("chat", {"error": {}}, "engine_error"),
        ("chat", {"error": {"message": "m", "type": "BadRequestError", "code": 400}}, "engine_refused"),
        ("chat", {"error": {"type": "SERVICE_UNAVAILABLE", "code": 503}}, "engine_overloaded"),
        ("chat", {"object": "error", "message": "m", "type": "503", "code": 503}, "engine_overloaded"),
        ("chat", {"message": "m", "type": "t", "code": 500}, "engine_error"),
        ("chat", {"detail": "Not Found"}, "engine_refused"),
        ("chat", {"choices": [{"delta": {}, "finish_reason": "abort"}]}, "engine_error"),
        ("responses", {"type": "error", "code": "server_error", "message": "m"}, "engine_error"),
        ("responses", {"type": "response.failed", "response": {"error": {"code": "server_error"}}}, "engine_error"),
        ("responses", {"type": "response.failed", "response": 3}, "engine_error"),
        ("messages", {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "engine_overloaded"),
        ("messages", {"type": "error", "error": {"type": "api_error", "message": "m"}}, "engine_error"),
        ("chat", {"error": None, "choices": []}, ""),
        ("chat", {"choices": [{"delta": {"content": json.dumps({"error": {"code": 500}})}}]}, ""),
        ("responses", {"type": "response.incomplete", "response": {"status": "incomplete", "error": None}}, ""),
    ],
)
def test_errors_of_every_shape_have_a_stable_reason(api, event, reason):
    assert read(api, event).error == reason


def test_an_error_event_by_name_needs_no_json():
    tap = SseTap("chat", hide_usage=False)
    tap.feed(b"event: error\ndata: boom\n\ndata: [DONE]\n\n", False)
    assert tap.error == "engine_error"
    assert tap.done


def framed():
    """A tap that knows the frame of CONTENT."""
    tap = SseTap("chat", hide_usage=True)
    tap.feed(CONTENT, False)
    assert tap.events == 1
    return tap


def test_a_chunk_that_begins_and_ends_as_usual_may_hold_more_between():
    tap = framed()
    assert tap.feed(CONTENT * 3, False) is None
    assert tap.events == 4
    assert tap.feed(CONTENT + USAGE + CONTENT, False) == CONTENT * 2
    assert tap.usage == Usage(3, 2)


def test_a_usual_chunk_behind_an_open_event_belongs_to_that_event():
    tap = framed()
    assert tap.feed(b"event: error\n", False) == b""
    assert tap.feed(CONTENT, False) == b"event: error\n" + CONTENT
    assert tap.error == "engine_error"
    assert tap.feed(USAGE, False) == b""


@pytest.mark.parametrize("spelling", ["response.output_text.delta", "response.output_\\u0074ext.delta"])
def test_a_text_that_reads_like_another_field_is_not_taken_for_it(spelling):
    tap = SseTap("responses", hide_usage=False)
    event = 'data: {"type":"%s","delta":"' + spelling + '"}\n\n'
    tap.feed((event % "response.output_text.delta").encode(), False)
    assert tap.started
    tap.feed((event % "response.failed").encode(), False)
    assert tap.error == "engine_error"


def test_the_role_chunk_of_a_second_choice_is_no_token():
    second = {"choices": [{"index": 1, "delta": {"role": "assistant", "content": ""}}]}
    assert read("chat", delta(content="a"), second).delivered_tokens() == 1
