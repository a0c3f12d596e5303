"""Every metric's name, kind, labels, buckets and meaning: the one place where they are said.

`gateway_*` are the names Arks' dashboards know, `gen_ai_*` are OpenTelemetry's GenAI names as Prometheus writes them,
`arks_*` are our own. docs/metrics.md is this table in prose (`python -m extproc.observe.names` prints it).
No label's values come from a client's text: namespaces, models and tokens are resources' names.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricName:
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """upper bounds of a histogram, without +Inf"""


# --- Arks' names. Label `user` is added to those marked so only where per-token labels are switched on.

REQUESTS = MetricName(
    "gateway_requests_total",
    "counter",
    "Requests that were admitted and have ended, once each, by the status the client got (499: it left).",
    ("namespace", "model", "status"),
)
REQUEST_DURATION = MetricName(
    "gateway_request_duration_seconds",
    "histogram",
    "Request headers to the end of the answer, of admitted requests.",
    ("namespace", "model"),
    (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0),
)
RESPONSE_DURATION_MS = MetricName(
    "gateway_response_process_duration_milliseconds",
    "histogram",
    "First content of the answer to its end.",
    ("namespace", "model"),
    (1.0, 5.0, 10.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0),
)
TOKEN_USAGE = MetricName(
    "gateway_token_usage",
    "counter",
    "Tokens charged. `input` counts cached ones too, `output` reasoning ones too.",
    ("namespace", "model", "type"),
)
TOKEN_DISTRIBUTION = MetricName(
    "gateway_token_distribution",
    "histogram",
    "Tokens charged per request.",
    ("namespace", "model", "type"),
    tuple(float(2**power) for power in range(17)),
)
RATE_LIMIT_HITS = MetricName(
    "gateway_rate_limit_hits_total",
    "counter",
    "Requests refused by a limit or quota, by the rule that refused (rpm, rpd, tpm, tpd, prompt, response, total, "
    "concurrency).",
    ("namespace", "model", "rule_type"),
)
RATE_LIMIT_TOKENS = MetricName(
    "gateway_rate_limit_tokens",
    "gauge",
    "What is left of a token's limit in the present minute or day, in requests (rpm, rpd) or tokens (tpm, tpd), once "
    "it was used there. With `--metrics-per-token` only.",
    ("namespace", "user", "model", "rule_type"),
)
ERRORS = MetricName(
    "gateway_errors_total",
    "counter",
    "Requests that failed, by stable reason; `model` is empty where the request was refused before one was known.",
    ("namespace", "model", "error_type"),
)
QUOTA_USAGE = MetricName(
    "gateway_quota_usage",
    "gauge",
    "Tokens of a quota that are spent or held by open requests.",
    ("namespace", "quota_name", "quota_type"),
)
QUOTA_LIMIT = MetricName(
    "gateway_quota_limit", "gauge", "Tokens a quota allows in its life.", ("namespace", "quota_name", "quota_type")
)

# --- OpenTelemetry GenAI semantic conventions, bucket bounds as they advise.

GEN_AI_DURATION = MetricName(
    "gen_ai_server_request_duration_seconds",
    "histogram",
    "Request headers to the end of the answer.",
    ("gen_ai_operation_name", "gen_ai_request_model", "namespace"),
    tuple(0.01 * 2**power for power in range(14)),
)
GEN_AI_TTFT = MetricName(
    "gen_ai_server_time_to_first_token_seconds",
    "histogram",
    "Request headers to the first content event.",
    ("gen_ai_operation_name", "gen_ai_request_model", "namespace"),
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
GEN_AI_TPOT = MetricName(
    "gen_ai_server_time_per_output_token_seconds",
    "histogram",
    "Time per output token after the first, of streamed answers.",
    ("gen_ai_operation_name", "gen_ai_request_model", "namespace"),
    (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
GEN_AI_TOKENS = MetricName(
    "gen_ai_client_token_usage",
    "histogram",
    "Tokens per request.",
    ("gen_ai_operation_name", "gen_ai_request_model", "gen_ai_token_type", "namespace"),
    tuple(float(4**power) for power in range(14)),
)

# --- Our own, counted on the requests' way.

REFUSED = MetricName(
    "arks_refused_requests_total",
    "counter",
    "Requests refused before any engine, by stable reason; `namespace` is empty where no token was recognised.",
    ("namespace", "reason"),
)
CACHED_TOKENS = MetricName(
    "arks_cached_prompt_tokens_total",
    "counter",
    "Prompt tokens the engine took from its prefix cache.",
    ("namespace", "model"),
)
USAGE_ACCURACY = MetricName(
    "arks_usage_records_total",
    "counter",
    "Settled requests by how their tokens are known: exact (the engine said so) or estimated.",
    ("namespace", "model", "accuracy"),
)
STREAMED = MetricName(
    "arks_streamed_requests_total", "counter", "Ended requests that were streamed.", ("namespace", "model")
)

# --- Our own, asked for at each scrape (`GatewayMetrics.watch`).

OPEN_STREAMS = MetricName("arks_open_streams", "gauge", "Admitted requests that have not ended.")
POLICY_VERSION = MetricName("arks_policy_version", "gauge", "Number of the policy in force; grows by one per change.")
POLICY_AGE = MetricName(
    "arks_policy_age_seconds",
    "gauge",
    "Since the policy in force was last known to be the present one: since the folder was read, or since the "
    "controller last said so, its own view's age included.",
)
POLICY_BROKEN = MetricName(
    "arks_policy_broken",
    "gauge",
    "1 while the policy folder holds an error, or the controller is away, and the last good policy stays in force.",
)
POLICY_ERRORS = MetricName("arks_policy_errors_total", "counter", "Policy changes that were refused for an error.")
JOURNAL_WORKING = MetricName(
    "arks_journal_working", "gauge", "1 while limits and usage can be written to the state folder, else 0."
)
JOURNAL_QUEUED = MetricName("arks_journal_queued", "gauge", "Entries that are not yet on disk.")
JOURNAL_DROPPED = MetricName(
    "arks_journal_dropped_total", "counter", "Usage rows given up because the state folder could not be written."
)
STATE_FREE = MetricName(
    "arks_state_free_bytes", "gauge", "Room that is left where the state folder is: ledger and counters grow there."
)
LEDGER_ROWS = MetricName("arks_ledger_rows_total", "counter", "Usage rows written to the ledger.")
OPEN_LEASES = MetricName("arks_open_leases", "gauge", "Reservations that are neither settled nor released.")
LEASES_EXPIRED = MetricName(
    "arks_leases_expired_total", "counter", "Reservations that nobody settled in time, charged as estimated."
)
LOOP_LAG_MAX = MetricName(
    "arks_event_loop_lag_max_seconds", "gauge", "Longest pause of the event loop since the last scrape."
)
ENGINE_HEALTHY = MetricName("arks_engine_healthy", "gauge", "1 while an engine may be picked, else 0.", ("engine",))
ENGINE_IN_FLIGHT = MetricName("arks_engine_in_flight", "gauge", "Requests running on an engine.", ("engine",))
DRAINING = MetricName("arks_draining", "gauge", "1 between SIGTERM and the end of the last stream.")
BUILD = MetricName("arks_build_info", "gauge", "Always 1; labels tell what runs.", ("version", "transport"))

ALL: tuple[MetricName, ...] = tuple(value for value in list(globals().values()) if isinstance(value, MetricName))
PER_TOKEN: tuple[MetricName, ...] = (
    REQUESTS,
    REQUEST_DURATION,
    RESPONSE_DURATION_MS,
    TOKEN_USAGE,
    TOKEN_DISTRIBUTION,
    RATE_LIMIT_HITS,
)
"""these carry the label `user` too where per-token labels are switched on"""


def table() -> str:
    """All names as a Markdown table."""
    rows = ["| name | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    rows += [f"| `{m.name}` | {m.kind} | {', '.join(m.labels) or '–'} | {m.help} |" for m in ALL]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
