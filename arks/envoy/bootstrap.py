"""The static bootstrap of a plain Envoy 1.40 that stands before extproc: `GatewaySettings` in, Envoy's JSON out.

One listener, one route: extproc decides everything (also what path exists), and pins the engine it picked. Engines come
from a file that extproc writes. The reasons stand beside the fields; facts about Envoy were verified on 1.40.0.
"""

import json
from typing import Any, TypeAlias

from apis.eds import ENGINES_CLUSTER, socket_address
from apis.headers import PIN_HEADER
from arks.envoy.settings import METADATA_NAMESPACES, OWNED_HEADERS, OWNED_PREFIXES, GatewaySettings

Tree: TypeAlias = dict[str, Any]

EXTPROC_CLUSTER = "extproc"
EXT_PROC_FILTER = "envoy.filters.http.ext_proc"
LISTENER = "gateway"
STAT_PREFIX = "gateway"


def render_bootstrap(settings: GatewaySettings) -> bytes:
    """The file for `envoy -c`. Raises ValueError for an address that is none."""
    return json.dumps(bootstrap(settings), indent=1).encode()


def bootstrap(settings: GatewaySettings) -> Tree:
    return {
        "node": {"id": "arks", "cluster": "arks"},
        "admin": {"address": _address(settings.admin)},
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": [_extproc_cluster(settings), _engines_cluster(settings)],
        },
        "overload_manager": _overload(settings),
    }


def _typed(name: str, type_name: str, **fields: Any) -> Tree:
    config = {"@type": f"type.googleapis.com/{type_name}", **fields}
    return {"name": name, "typed_config": config}


def _seconds(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".") + "s"


def _address(address: str) -> Tree:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:"), "mode": 0o600}}
    return socket_address(address)


def _listener(settings: GatewaySettings) -> Tree:
    return {
        "name": LISTENER,
        "address": _address(settings.listen),
        "per_connection_buffer_limit_bytes": settings.connection_buffer_bytes,
        # One worker gains nothing by it, and a second gateway on the same port would silently share its traffic.
        "enable_reuse_port": settings.concurrency > 1,
        "filter_chains": [
            {
                "filters": [
                    _typed(
                        "envoy.filters.network.http_connection_manager",
                        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        **_connection_manager(settings),
                    )
                ]
            }
        ],
    }


def _connection_manager(settings: GatewaySettings) -> Tree:
    return {
        "stat_prefix": STAT_PREFIX,
        "codec_type": "AUTO",
        "route_config": _routes(settings),
        "http_filters": [
            {
                **_typed(
                    EXT_PROC_FILTER,
                    "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
                    **_ext_proc(settings),
                ),
                # Off here, on in the route: a refusal of Envoy's codec (431, broken HTTP) has no route. It would wait
                # for extproc's word on its headers while the connection closes, and the client would get nothing.
                "disabled": True,
            },
            _typed(
                "envoy.filters.http.router",
                "envoy.extensions.filters.http.router.v3.Router",
                suppress_envoy_headers=True,
            ),
        ],
        "early_header_mutation_extensions": [_edge_removal()],
        "common_http_protocol_options": {
            "idle_timeout": _seconds(settings.downstream_idle_timeout_s),
            "max_headers_count": settings.headers_limit,
            # Dropped, not refused: a proxy behind us could read them as the name with dashes, clients do send them.
            "headers_with_underscores_action": "DROP_HEADER",
        },
        "http2_protocol_options": {
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": 1024 * 1024,
            "initial_connection_window_size": 16 * 1024 * 1024,
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
            # One broken request ends its own stream, not its neighbours' on the connection.
            "override_stream_error_on_invalid_http_message": True,
        },
        "max_request_headers_kb": settings.headers_limit_kib,
        "request_headers_timeout": _seconds(settings.request_headers_timeout_s),
        "request_timeout": _seconds(settings.request_timeout_s),
        "stream_idle_timeout": _seconds(settings.stream_idle_timeout_s),
        "use_remote_address": True,
        "xff_num_trusted_hops": settings.trusted_hops,
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        # A client's own id goes through unchanged: by default Envoy writes its trace decision into UUIDs.
        "request_id_extension": {
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
            }
        },
        "server_name": "arks",
        "normalize_path": True,
        "merge_slashes": True,
        # Model ids have slashes: clients ask for /v1/models/org%2Fname. extproc judges the unescaped path.
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
        "local_reply_config": _local_replies(),
        "access_log": _access_log(settings),
    }


def _edge_removal() -> Tree:
    exact = [{"remove": name} for name in OWNED_HEADERS]
    prefixes = [{"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in OWNED_PREFIXES]
    return _typed(
        "envoy.http.early_header_mutation.header_mutation",
        "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=exact + prefixes,
    )


def _routes(settings: GatewaySettings) -> Tree:
    route = {
        "match": {"prefix": "/"},
        "typed_per_filter_config": {
            EXT_PROC_FILTER: {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}
        },
        # Request bodies are buffered for the decision and for a retry; the connection's own limit stays small.
        "request_body_buffer_limit": settings.body_limit_bytes,
        "route": {
            "cluster": ENGINES_CLUSTER,
            "timeout": "0s",  # the default of 15 s cuts generations
            "idle_timeout": _seconds(settings.stream_idle_timeout_s),
            "retry_policy": {
                # `reset` is every loss before response headers; once those have gone out Envoy never retries.
                "retry_on": "connect-failure,refused-stream,reset",
                "num_retries": settings.retries,
                "retry_host_predicate": [
                    _typed(
                        "envoy.retry_host_predicates.previous_hosts",
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                    )
                ],
                "host_selection_retry_max_attempts": "5",
                "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
            },
        },
    }
    return {"name": "gateway", "virtual_hosts": [{"name": "gateway", "domains": ["*"], "routes": [route]}]}


def _ext_proc(settings: GatewaySettings) -> Tree:
    return {
        "stat_prefix": "arks",
        "grpc_service": {"envoy_grpc": {"cluster_name": EXTPROC_CLUSTER}, "timeout": "0s"},
        "failure_mode_allow": False,  # nothing passes undecided
        "status_on_error": {"code": "ServiceUnavailable"},
        "message_timeout": _seconds(settings.message_timeout_s),
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SEND",
            "response_body_mode": "STREAMED",
            "response_trailer_mode": "SKIP",
        },
        "allow_mode_override": True,
        # A STREAMED response would lose its content-length; extproc removes it itself where it changes a body.
        "allow_content_length_header": True,
        "response_attributes": ["upstream.address", "upstream.request_attempt_count", "response.code_details"],
        "metadata_options": {"receiving_namespaces": {"untyped": list(METADATA_NAMESPACES)}},
    }


def _breakers(settings: GatewaySettings) -> Tree:
    limit = settings.requests
    thresholds = {
        "max_connections": limit,
        "max_pending_requests": limit,
        "max_requests": limit,
        "max_retries": limit,
    }
    return {"thresholds": [{"priority": "DEFAULT", **thresholds}]}


def _http_options(**fields: Any) -> Tree:
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {name: {"@type": f"type.googleapis.com/{name}", **fields}}


def _extproc_cluster(settings: GatewaySettings) -> Tree:
    return {
        "name": EXTPROC_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": settings.body_limit_bytes,
        "circuit_breakers": _breakers(settings),
        "typed_extension_protocol_options": _http_options(
            explicit_http_config={
                "http2_protocol_options": {
                    "initial_stream_window_size": 16 * 1024 * 1024,
                    "initial_connection_window_size": 64 * 1024 * 1024,
                    "connection_keepalive": {"interval": "30s", "timeout": "10s"},
                }
            }
        ),
        "load_assignment": {
            "cluster_name": EXTPROC_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _peer(settings.extproc)}}]}],
        },
    }


def _peer(address: str) -> Tree:
    """Where to connect to; file modes are the listener's."""
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    return socket_address(address)


def _engines_cluster(settings: GatewaySettings) -> Tree:
    least_request = _typed(
        "envoy.load_balancing_policies.least_request",
        "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    override = _typed(
        "envoy.load_balancing_policies.override_host",
        "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[
            {"metadata": {"key": "envoy.lb", "path": [{"key": PIN_HEADER}]}},
            {"header": PIN_HEADER},
        ],
        fallback_policy={"policies": [{"typed_extension_config": least_request}]},
    )
    return {
        "name": ENGINES_CLUSTER,
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "path_config_source": {
                    "path": str(settings.eds_file),
                    "watched_directory": {"path": str(settings.eds_file.parent)},
                },
                "resource_api_version": "V3",
            }
        },
        "connect_timeout": _seconds(settings.connect_timeout_s),
        "per_connection_buffer_limit_bytes": settings.connection_buffer_bytes,
        "circuit_breakers": _breakers(settings),
        "upstream_connection_options": {
            "tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 60, "keepalive_interval": 20}
        },
        "typed_extension_protocol_options": _http_options(
            common_http_protocol_options={"idle_timeout": _seconds(settings.upstream_idle_timeout_s)},
            explicit_http_config={"http_protocol_options": {}},
        ),
        "load_balancing_policy": {"policies": [{"typed_extension_config": override}]},
    }


def _overload(settings: GatewaySettings) -> Tree:
    heap = "envoy.resource_monitors.fixed_heap"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            _typed(
                heap,
                "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                max_heap_size_bytes=settings.heap_limit_bytes,
            ),
            _typed(
                "envoy.resource_monitors.global_downstream_max_connections",
                "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=settings.downstream_connections,
            ),
        ],
        "actions": [
            {"name": f"envoy.overload_actions.{action}", "triggers": [{"name": heap, "threshold": {"value": value}}]}
            for action, value in (("shrink_heap", 0.9), ("stop_accepting_requests", 0.95))
        ],
    }


ENVOYS_OWN_ERRORS = (
    (400, "invalid_request_error", "bad_request", "The request is not valid HTTP."),
    (403, "invalid_request_error", "upgrade_refused", "The gateway speaks plain HTTP only: no WebSocket, no tunnel."),
    (408, "invalid_request_error", "request_timeout", "The request was not received in time."),
    (413, "invalid_request_error", "body_too_large", "The request body is larger than the gateway accepts."),
    (426, "invalid_request_error", "http_version_too_old", "Speak HTTP/1.1 or HTTP/2."),
    (431, "invalid_request_error", "headers_too_large", "The request headers are larger than the gateway accepts."),
    (501, "invalid_request_error", "unsupported_transfer", "Send the body plain or chunked, nothing else."),
    (502, "server_error", "engine_broken", "The engine's answer was no valid HTTP."),
    (503, "server_error", "gateway_unavailable", "The gateway cannot answer now. Try again."),
    (504, "server_error", "engine_timeout", "The engine did not answer in time."),
)
"""status, type, code and message of what Envoy answers without extproc's word (docs/errors.md)"""


def _local_replies() -> Tree:
    """Envoy's own answers in OpenAI's error shape. extproc's answers are JSON already and stay as they are."""

    def mapper(status: int, error_type: str, code: str, message: str) -> Tree:
        error = {"message": message, "type": error_type, "param": None, "code": code}
        envoys_own = _typed(
            "envoy.access_loggers.extension_filters.cel",
            "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
            expression="!('content-type' in response.headers)",
        )
        comparison = {"op": "EQ", "value": {"default_value": status, "runtime_key": "arks.none"}}
        matches_status = {"status_code_filter": {"comparison": comparison}}
        return {
            "filter": {"and_filter": {"filters": [matches_status, {"extension_filter": envoys_own}]}},
            "body_format_override": {
                "json_format": {"type": "error", "error": error},
                "content_type": "application/json",
            },
        }

    return {"mappers": [mapper(*error) for error in ENVOYS_OWN_ERRORS]}


def _access_log(settings: GatewaySettings) -> list[Tree]:
    return [_broken_off_log(), *_file_log(settings)]


def _broken_off_log() -> Tree:
    """To extproc, of requests with a response flag: ext_proc cannot tell a client that left from a dead engine."""
    return _typed(
        "envoy.access_loggers.http_grpc",
        "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": "arks",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": EXTPROC_CLUSTER}},
            "buffer_flush_interval": "0.1s",
        },
    ) | {"filter": {"response_flag_filter": {}}}


def _file_log(settings: GatewaySettings) -> list[Tree]:
    if settings.access_log is None:
        return []
    decision = {
        key: f"%DYNAMIC_METADATA(arks:{key})%" for key in ("token", "namespace", "model", "endpoint", "decision")
    }
    entry = {
        "event": "request",
        "time": "%START_TIME(%Y-%m-%dT%H:%M:%E3SZ)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ)%",  # without the query: people put secrets there
        "protocol": "%PROTOCOL%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "duration_ms": "%DURATION%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "engine": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        **decision,
    }
    return [
        _typed(
            "envoy.access_loggers.file",
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            path=settings.access_log,
            log_format={"json_format": entry},
        )
    ]
