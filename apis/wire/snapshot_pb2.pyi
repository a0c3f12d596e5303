from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_TOKEN: _ClassVar[Kind]
    KIND_QUOTA: _ClassVar[Kind]
    KIND_ENDPOINT: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
KIND_TOKEN: Kind
KIND_QUOTA: Kind
KIND_ENDPOINT: Kind

class FollowRequest(_message.Message):
    __slots__ = ("epoch", "generation", "checksum", "follower")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FOLLOWER_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    generation: int
    checksum: bytes
    follower: str
    def __init__(self, epoch: _Optional[str] = ..., generation: _Optional[int] = ..., checksum: _Optional[bytes] = ..., follower: _Optional[str] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("part", "change", "pulse", "load")
    PART_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    PULSE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    part: Part
    change: Change
    pulse: Pulse
    load: Load
    def __init__(self, part: _Optional[_Union[Part, _Mapping]] = ..., change: _Optional[_Union[Change, _Mapping]] = ..., pulse: _Optional[_Union[Pulse, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("kind", "namespace", "name", "payload")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    kind: Kind
    namespace: str
    name: str
    payload: bytes
    def __init__(self, kind: _Optional[_Union[Kind, str]] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("epoch", "generation", "records", "last", "checksum")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    generation: int
    records: _containers.RepeatedCompositeFieldContainer[Record]
    last: bool
    checksum: bytes
    def __init__(self, epoch: _Optional[str] = ..., generation: _Optional[int] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., last: _Optional[bool] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("generation", "records", "checksum")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    generation: int
    records: _containers.RepeatedCompositeFieldContainer[Record]
    checksum: bytes
    def __init__(self, generation: _Optional[int] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class Pulse(_message.Message):
    __slots__ = ("generation", "checksum", "view_age_s", "ready")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    VIEW_AGE_S_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    checksum: bytes
    view_age_s: float
    ready: bool
    def __init__(self, generation: _Optional[int] = ..., checksum: _Optional[bytes] = ..., view_age_s: _Optional[float] = ..., ready: _Optional[bool] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineLoad]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineLoad, _Mapping]]] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("address", "running", "waiting", "kv_usage", "healthy", "ttft_s")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    address: str
    running: int
    waiting: int
    kv_usage: float
    healthy: bool
    ttft_s: float
    def __init__(self, address: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., healthy: _Optional[bool] = ..., ttft_s: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("quotas",)
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    quotas: _containers.RepeatedCompositeFieldContainer[QuotaUse]
    def __init__(self, quotas: _Optional[_Iterable[_Union[QuotaUse, _Mapping]]] = ...) -> None: ...

class QuotaUse(_message.Message):
    __slots__ = ("namespace", "name", "prompt", "response", "total")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    prompt: int
    response: int
    total: int
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., prompt: _Optional[int] = ..., response: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
