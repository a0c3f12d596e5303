"""The hand-written codec against the generated classes of the same schema."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apis.wire import ext_proc_pb2 as pb
from extproc import messages
from extproc.messages import BadMessage, HeaderNames

NAME = st.from_regex(r":?[a-z][a-z0-9-]{0,40}", fullmatch=True)
# What Envoy lets into a header's value: no control characters but tab.
VALUE = st.lists(st.sampled_from([9, *range(32, 127), *range(128, 256)]), max_size=300).map(bytes)
HEADERS = st.lists(st.tuples(NAME, VALUE), max_size=12)


def header_message(headers, *, end_of_stream=False, field="request_headers", attributes=None):
    message = pb.ProcessingRequest()
    target = getattr(message, field)
    target.end_of_stream = end_of_stream
    for name, value in headers:
        target.headers.headers.add(key=name, raw_value=value)
    target.headers.SetInParent()
    for name, value in (attributes or {}).items():
        message.attributes["envoy.filters.http.ext_proc"].fields[name].string_value = value
    return message


@given(HEADERS, st.booleans(), NAME)
def test_headers_are_found_as_the_generated_class_has_them(headers, end_of_stream, other):
    raw = header_message(headers, end_of_stream=end_of_stream).SerializeToString()
    assert messages.kind_of(raw)[0] == messages.REQUEST_HEADERS
    at, end, eos, _ = messages.headers_of(raw)
    assert eos is end_of_stream
    for name in {other, *(name for name, _ in headers)}:
        values = [value for key, value in headers if key == name]
        expected = next(filter(None, values), b"" if values else None)
        assert HeaderNames(name).find(raw, at, end) == [expected]


def test_header_name_inside_another_value_is_not_taken_for_the_header():
    smuggled = b"authorization: Bearer x"
    tab = b"\tx-api-key"  # ten bytes, so that its length reads like a tag, and the tab like a key's length
    raw = header_message([("cookie", smuggled), ("x-note", tab), ("x-api-key", b"real")]).SerializeToString()
    at, end, _, _ = messages.headers_of(raw)
    assert HeaderNames("authorization", "x-api-key").find(raw, at, end) == [None, b"real"]


def test_plain_value_field_is_read_too():
    message = pb.ProcessingRequest()
    message.request_headers.headers.headers.add(key=":path", value="/v1/models")
    raw = message.SerializeToString()
    at, end, _, _ = messages.headers_of(raw)
    assert HeaderNames(":path").find(raw, at, end) == [b"/v1/models"]


@given(
    st.integers(0, 40000),
    st.sampled_from(["", "metadata", "more"]),
    st.booleans(),
    st.sampled_from(["request_body", "response_body"]),
)
def test_bodies_of_any_size(size, more, end_of_stream, field):
    body = bytes(i & 0xFF for i in range(size))[:-2] + b"B\0" if size > 1 else b"x" * size
    message = pb.ProcessingRequest()
    getattr(message, field).body = body
    getattr(message, field).end_of_stream = end_of_stream
    getattr(message, field).SetInParent()
    if more == "metadata":
        message.metadata_context.SetInParent()  # as Envoy sends it where it forwards none
    elif more:
        message.protocol_config.request_body_mode = 2
    raw = message.SerializeToString()
    kind, _, _ = messages.kind_of(raw)
    assert kind == (messages.REQUEST_BODY if field == "request_body" else messages.RESPONSE_BODY)
    assert messages.body_of(raw) == (body, end_of_stream)


@given(
    st.dictionaries(st.sampled_from(["upstream.address", "response.code", "x"]), st.text(max_size=30)), st.booleans()
)
def test_attributes(attributes, metadata):
    message = header_message([("a", b"b")], field="response_headers", attributes=attributes)
    if metadata:
        # Claims of a client's own making stand before the attributes, and may hold any text.
        forged = b"\x0a\x10upstream.address\x12\x07\x1a\x056.6.6".decode()
        message.metadata_context.filter_metadata["jwt"].fields["claim"].string_value = forged
    raw = message.SerializeToString()
    _, _, end = messages.kind_of(raw)
    where = messages.attributes_of(raw, end)
    for name in ("upstream.address", "response.code", "absent"):
        assert messages.Attribute(name).text(raw, *where) == attributes.get(name)


def test_message_with_the_oneof_last_or_absent():
    config = pb.ProcessingRequest()
    config.protocol_config.request_body_mode = 2
    body = pb.ProcessingRequest()
    body.request_body.body = b"late"
    raw = config.SerializeToString() + body.SerializeToString()
    kind, _, _ = messages.kind_of(raw)
    assert (kind, messages.body_of(raw)[0]) == (messages.REQUEST_BODY, b"late")
    assert messages.kind_of(config.SerializeToString()) == (0, 0, 0)
    assert messages.kind_of(b"") == (0, 0, 0)


@given(st.binary(max_size=200))
def test_garbage_is_a_bad_message_or_nothing(data):
    try:
        kind, at, end = messages.kind_of(data)
        if kind in (messages.REQUEST_BODY, messages.RESPONSE_BODY):
            messages.body_of(data)
        elif kind:
            at, stop, _, end = messages.headers_of(data)
            HeaderNames(":path").find(data, at, stop)
            messages.Attribute("upstream.address").text(data, *messages.attributes_of(data, end))
    except BadMessage:
        pass


@given(
    HEADERS,
    st.lists(NAME, max_size=3),
    st.binary(max_size=300),
    st.dictionaries(NAME, st.text(max_size=200), max_size=3),
)
def test_request_body_reply(headers, removed, body, fields):
    mutation = b"".join([messages.set_header(n, v) for n, v in headers] + [messages.remove_header(n) for n in removed])
    metadata = messages.metadata("arks", messages.string_struct(fields))
    reply = pb.ProcessingResponse.FromString(messages.request_body_reply(mutation, metadata, body))
    common = reply.request_body.response
    assert [(h.header.key, h.header.raw_value, h.append_action) for h in common.header_mutation.set_headers] == [
        (name, value, 2) for name, value in headers
    ]
    assert list(common.header_mutation.remove_headers) == removed
    assert common.clear_route_cache
    assert common.body_mutation.body == body
    assert {k: v.string_value for k, v in reply.dynamic_metadata.fields["arks"].struct_value.fields.items()} == fields
    without = pb.ProcessingResponse.FromString(messages.request_body_reply(mutation, metadata, None))
    assert not without.request_body.response.HasField("body_mutation")


@pytest.mark.parametrize("body", [b"x", b"", b"y" * 70000])
def test_response_body_reply(body):
    reply = pb.ProcessingResponse.FromString(messages.response_body_reply(body)).response_body.response
    assert reply.body_mutation.WhichOneof("mutation") == ("body" if body else "clear_body")
    assert reply.body_mutation.body == body


def test_immediate_response_and_constants():
    raw = messages.immediate_response(429, messages.set_header("retry-after", b"3"), b"{}", "arks_x")
    answer = pb.ProcessingResponse.FromString(raw).immediate_response
    assert (answer.status.code, answer.body, answer.details) == (429, b"{}", "arks_x")
    assert answer.headers.set_headers[0].header.key == "retry-after"
    for constant, field in (
        (messages.CONTINUE_REQUEST_HEADERS, "request_headers"),
        (messages.CONTINUE_REQUEST_BODY, "request_body"),
        (messages.CONTINUE_REQUEST_TRAILERS, "request_trailers"),
        (messages.CONTINUE_RESPONSE_HEADERS, "response_headers"),
        (messages.CONTINUE_RESPONSE_BODY, "response_body"),
        (messages.CONTINUE_RESPONSE_TRAILERS, "response_trailers"),
    ):
        assert pb.ProcessingResponse.FromString(constant).WhichOneof("response") == field
    headers = pb.ProcessingResponse.FromString(messages.response_headers_reply(messages.set_header("a", b"b")))
    assert headers.response_headers.response.header_mutation.set_headers[0].header.raw_value == b"b"
