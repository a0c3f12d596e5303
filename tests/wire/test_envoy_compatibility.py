"""Our subset of Envoy's API and the full API, written by someone else, must read each other's bytes."""

import warnings

import betterproto2
import pytest
from google.protobuf.descriptor import FieldDescriptor

from apis.wire import access_log_pb2, core_pb2, ext_proc_pb2

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its generated pydantic decorators are of an older style
    from envoy_data_plane.envoy.config.core import v3 as full_core
    from envoy_data_plane.envoy.data.accesslog import v3 as full_entry
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as full_mode
    from envoy_data_plane.envoy.service.accesslog import v3 as full_log
    from envoy_data_plane.envoy.service.ext_proc import v3 as full_proc
    from envoy_data_plane.envoy.type import v3 as full_type

# Our message -> the message of the full API it is the subset of.
SOURCES = {
    **{
        getattr(ext_proc_pb2, name): getattr(full_proc, name)
        for name in [
            "BodyMutation",
            "BodyResponse",
            "CommonResponse",
            "GrpcStatus",
            "HeaderMutation",
            "HeadersResponse",
            "HttpBody",
            "HttpHeaders",
            "HttpTrailers",
            "ImmediateResponse",
            "ProcessingRequest",
            "ProcessingResponse",
            "ProtocolConfiguration",
            "StreamedBodyResponse",
            "StreamedImmediateResponse",
            "TrailersResponse",
        ]
    },
    ext_proc_pb2.ProcessingMode: full_mode.ProcessingMode,
    **{
        getattr(core_pb2, name): getattr(full_core, name)
        for name in [
            "Address",
            "HeaderMap",
            "HeaderValue",
            "HeaderValueOption",
            "Locality",
            "Metadata",
            "Node",
            "Pipe",
            "SocketAddress",
        ]
    },
    core_pb2.HttpStatus: full_type.HttpStatus,
    access_log_pb2.AccessLogCommon: full_entry.AccessLogCommon,
    access_log_pb2.HTTPAccessLogEntry: full_entry.HttpAccessLogEntry,
    access_log_pb2.HTTPRequestProperties: full_entry.HttpRequestProperties,
    access_log_pb2.HTTPResponseProperties: full_entry.HttpResponseProperties,
    access_log_pb2.ResponseFlags: full_entry.ResponseFlags,
    access_log_pb2.ResponseFlags.Unauthorized: full_entry.ResponseFlagsUnauthorized,
    access_log_pb2.StreamAccessLogsMessage: full_log.StreamAccessLogsMessage,
    access_log_pb2.StreamAccessLogsMessage.Identifier: full_log.StreamAccessLogsMessageIdentifier,
    access_log_pb2.StreamAccessLogsMessage.HTTPAccessLogEntries: full_log.StreamAccessLogsMessageHttpAccessLogEntries,
    access_log_pb2.StreamAccessLogsResponse: full_log.StreamAccessLogsResponse,
}
SCALARS = {
    FieldDescriptor.TYPE_BOOL: True,
    FieldDescriptor.TYPE_BYTES: b"\x00\xff raw",
    FieldDescriptor.TYPE_DOUBLE: 0.5,
    FieldDescriptor.TYPE_INT32: 429,
    FieldDescriptor.TYPE_INT64: 1 << 33,
    FieldDescriptor.TYPE_STRING: "täxt",
    FieldDescriptor.TYPE_UINT32: 4242,
    FieldDescriptor.TYPE_UINT64: 1 << 34,
}
# Every kind of field that a later API might add: varint, 64 bit, bytes, 32 bit, at numbers far from today's.
UNKNOWN = bytes.fromhex("c8bb0101d1bb010102030405060708dabb0103616263e5bb0101020304")


def fill(message, only=None, depth=0):
    """Set every field (of each oneof just `only`, or its first) to something that is not its default."""
    for field in message.DESCRIPTOR.fields:
        group = field.containing_oneof
        if group is not None:
            wanted = only if only in {member.name for member in group.fields} else group.fields[0].name
            if field.name != wanted:
                continue
        entry = field.message_type
        if entry is not None and entry.full_name == "google.protobuf.Struct":
            getattr(message, field.name).update({"n": 2.5, "s": "x", "l": [True, None]})
        elif entry is not None and entry.name in {"Duration", "Timestamp"}:
            getattr(message, field.name).FromSeconds(77)  # betterproto2 keeps microseconds at best
        elif entry is not None and entry.full_name == "google.protobuf.Any":
            getattr(message, field.name).type_url = "type.googleapis.com/none"
        elif entry is not None and entry.GetOptions().map_entry:
            value = entry.fields_by_name["value"]
            if value.message_type is None:
                getattr(message, field.name)["k"] = "v"
            elif value.message_type.name == "Struct":
                getattr(message, field.name)["k"].update({"a": 1, "b": {"c": ["d"]}})
            else:
                getattr(message, field.name)["k"].type_url = "type.googleapis.com/none"
        elif entry is not None:
            if depth > 8:
                continue
            values = getattr(message, field.name)
            for _ in range(2 if field.is_repeated else 1):
                target = values.add() if field.is_repeated else values
                target.SetInParent()
                fill(target, depth=depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(["one", "two"])
        elif field.enum_type is not None:
            setattr(message, field.name, field.enum_type.values[-1].number)
        else:
            setattr(message, field.name, SCALARS[field.type])
    return message


CASES = [
    pytest.param(ours, theirs, choice, id=f"{ours.DESCRIPTOR.name}-{choice or 'all'}")
    for ours, theirs in SOURCES.items()
    for choice in [None, *(f.name for group in ours.DESCRIPTOR.oneofs for f in group.fields)]
]


@pytest.mark.parametrize(("ours", "theirs", "choice"), CASES)
def test_the_full_api_reads_and_rewrites_every_field_of_ours(ours, theirs, choice):
    message = fill(ours(), choice)
    # betterproto2 re-encodes from its own field tables, so a wrong number or type cannot come back the same.
    foreign = theirs.parse(message.SerializeToString(deterministic=True))
    assert not unknown_fields(foreign), "a field number that the full API does not know"
    back = ours()
    back.ParseFromString(bytes(foreign))
    assert back == message


def unknown_fields(message) -> bool:
    """Whether betterproto2 had to keep bytes that no field of its own explains, here or below."""
    if getattr(message, "_unknown_fields", b""):
        return True
    for name in message.__dataclass_fields__:
        value = getattr(message, name)
        parts = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        if any(isinstance(part, betterproto2.Message) and unknown_fields(part) for part in parts):
            return True
    return False


def test_every_message_of_the_subset_is_compared():
    def messages(holder):
        for message in holder.values():
            if not message.GetOptions().map_entry:
                yield message.full_name
                yield from messages(message.nested_types_by_name)

    declared = {
        name
        for module in (core_pb2, ext_proc_pb2, access_log_pb2)
        for name in messages(module.DESCRIPTOR.message_types_by_name)
    }
    assert {ours.DESCRIPTOR.full_name for ours in SOURCES} == declared


@pytest.mark.parametrize(("ours", "theirs"), [pytest.param(o, t, id=o.DESCRIPTOR.name) for o, t in SOURCES.items()])
def test_field_names_are_those_of_the_full_api(ours, theirs):
    numbers = {
        field.metadata["betterproto"].number: name.rstrip("_") for name, field in theirs.__dataclass_fields__.items()
    }
    for field in ours.DESCRIPTOR.fields:
        assert numbers[field.number] == field.name


@pytest.mark.parametrize("ours", [pytest.param(o, id=o.DESCRIPTOR.name) for o in SOURCES])
def test_fields_of_a_later_api_are_skipped_and_the_known_ones_kept(ours):
    message = fill(ours())
    read = ours.FromString(message.SerializeToString() + UNKNOWN)
    read.DiscardUnknownFields()
    assert read == message


def test_a_kind_of_request_from_a_later_api_reads_as_no_request():
    flow_control = bytes.fromhex("7a020801")  # field 15, a message
    read = ext_proc_pb2.ProcessingRequest.FromString(flow_control)
    assert read.WhichOneof("request") is None
    assert ext_proc_pb2.ProcessingRequest.FromString(b"").WhichOneof("request") is None


def test_tcp_entries_read_as_no_entries():
    theirs = full_log.StreamAccessLogsMessage(tcp_logs=full_log.StreamAccessLogsMessageTcpAccessLogEntries())
    assert access_log_pb2.StreamAccessLogsMessage.FromString(bytes(theirs)).WhichOneof("log_entries") is None


def test_enum_values_are_those_of_the_full_api():
    pairs = [
        (ext_proc_pb2.ProcessingMode.BodySendMode, full_mode.ProcessingModeBodySendMode),
        (ext_proc_pb2.ProcessingMode.HeaderSendMode, full_mode.ProcessingModeHeaderSendMode),
        (ext_proc_pb2.CommonResponse.ResponseStatus, full_proc.CommonResponseResponseStatus),
        (core_pb2.HeaderValueOption.HeaderAppendAction, full_core.HeaderValueOptionHeaderAppendAction),
        (core_pb2.RequestMethod, full_core.RequestMethod),
        (access_log_pb2.AccessLogType, full_entry.AccessLogType),
        (access_log_pb2.HTTPAccessLogEntry.HTTPVersion, full_entry.HttpAccessLogEntryHttpVersion),
        (access_log_pb2.ResponseFlags.Unauthorized.Reason, full_entry.ResponseFlagsUnauthorizedReason),
    ]
    for ours, theirs in pairs:
        plain = {name.replace("_", "").lower(): number for name, number in ours.items()}
        full = {member.name.replace("_", "").lower(): member.value for member in theirs}
        assert plain.items() <= full.items(), ours.DESCRIPTOR.full_name
