"""What /metrics says is what happened."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from extproc.observe import names
from extproc.observe.metrics import SLICE_LINES, GatewayMetrics

QWEN = ("default", "qwen-7b")


def read(metrics):
    """{(sample name, frozenset of labels): value}, as an independent parser sees it."""
    samples = {}
    text = metrics.text().decode()
    # The parser turns a counter's name into NAME_total; Prometheus itself keeps what it reads.
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name if f"\n{sample.name}" in text else sample.name.removesuffix("_total")
            key = (name, frozenset(sample.labels.items()))
            assert key not in samples, f"{key} is written twice"
            samples[key] = sample.value
    return samples


def value(samples, name, **labels):
    return samples[name, frozenset(labels.items())]


def done(metrics, endpoint=QWEN, status=200, reason="", duration_s=1.0, ttft_s=0.25, prompt=100, completion=50, **more):
    rest = {"cached": 0, "accuracy": "exact", "stream": True, **more}
    metrics.request_done(endpoint, status, reason, duration_s, ttft_s, prompt, completion, **rest)


def test_one_streamed_request_is_counted_once_everywhere():
    metrics = GatewayMetrics()
    done(metrics, cached=64)
    got = read(metrics)
    qwen = {"namespace": "default", "model": "qwen-7b"}
    otel = {"namespace": "default", "gen_ai_request_model": "qwen-7b", "gen_ai_operation_name": "chat"}
    assert value(got, "gateway_requests_total", status="200", **qwen) == 1
    assert value(got, "gateway_request_duration_seconds_count", **qwen) == 1
    assert value(got, "gateway_request_duration_seconds_sum", **qwen) == 1.0
    assert value(got, "gateway_response_process_duration_milliseconds_sum", **qwen) == 750
    assert value(got, "gateway_token_usage", type="input", **qwen) == 100
    assert value(got, "gateway_token_usage", type="output", **qwen) == 50
    assert value(got, "gen_ai_server_time_to_first_token_seconds_bucket", le="0.25", **otel) == 1
    assert value(got, "gen_ai_server_time_to_first_token_seconds_bucket", le="0.1", **otel) == 0
    assert value(got, "gen_ai_server_time_per_output_token_seconds_sum", **otel) == pytest.approx(0.75 / 49)
    assert value(got, "gen_ai_client_token_usage_sum", gen_ai_token_type="output", **otel) == 50
    assert value(got, "arks_cached_prompt_tokens_total", **qwen) == 64
    assert value(got, "arks_usage_records_total", accuracy="exact", **qwen) == 1
    assert value(got, "arks_usage_records_total", accuracy="estimated", **qwen) == 0


def test_operations_are_apart_for_opentelemetry_and_together_for_arks():
    metrics = GatewayMetrics()
    done(metrics, operation="chat")
    done(metrics, operation="embeddings", completion=0, ttft_s=None, stream=False)
    got = read(metrics)
    assert value(got, "gateway_requests_total", namespace="default", model="qwen-7b", status="200") == 2
    for operation in ("chat", "embeddings"):
        labels = {"namespace": "default", "gen_ai_request_model": "qwen-7b", "gen_ai_operation_name": operation}
        assert value(got, "gen_ai_server_request_duration_seconds_count", **labels) == 1


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.one_of(st.floats(0, 200), st.sampled_from(names.GEN_AI_DURATION.buckets)), max_size=20),
    tokens=st.lists(st.integers(0, 2**28) | st.sampled_from([2**power for power in range(28)]), max_size=20),
)
def test_every_bucket_counts_what_lies_below_its_bound(seconds, tokens):
    metrics = GatewayMetrics()
    for each in seconds:
        done(metrics, duration_s=each, ttft_s=None, prompt=0, completion=0)
    for each in tokens:
        done(metrics, duration_s=0.0, ttft_s=None, prompt=each, completion=1)
    durations = seconds + [0.0] * len(tokens)
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            bound = float(sample.labels.get("le", "nan"))
            if math.isnan(bound):
                continue
            if family.name in {"gateway_request_duration_seconds", "gen_ai_server_request_duration_seconds"}:
                assert sample.value == sum(each <= bound for each in durations), sample
            elif family.name in {"gateway_token_distribution", "gen_ai_client_token_usage"} and (
                "input" in sample.labels.values()
            ):
                assert sample.value == sum(each <= bound for each in tokens), sample


def test_refused_requests_are_errors_but_not_requests():
    metrics = GatewayMetrics()
    metrics.refused("", "token_unknown")
    metrics.refused("default", "rate_limit")
    metrics.rate_limited("default", "qwen-7b", "rpm")
    got = read(metrics)
    assert value(got, "arks_refused_requests_total", namespace="", reason="token_unknown") == 1
    assert value(got, "gateway_errors_total", namespace="default", model="", error_type="rate_limit") == 1
    assert value(got, "gateway_rate_limit_hits_total", namespace="default", model="qwen-7b", rule_type="rpm") == 1
    assert not [key for key in got if key[0] == "gateway_requests_total"]


def test_tokens_are_no_labels_unless_asked_for():
    quiet, loud = GatewayMetrics(), GatewayMetrics(per_token=True)
    for metrics in (quiet, loud):
        done(metrics, user="alice")
        done(metrics, user="bob")
        metrics.rate_limited("default", "qwen-7b", "tpm", "alice")
    assert b"alice" not in quiet.text()
    got = read(loud)
    for user in ("alice", "bob"):
        labels = {"namespace": "default", "model": "qwen-7b", "user": user}
        assert value(got, "gateway_requests_total", status="200", **labels) == 1
        assert value(got, "gateway_request_duration_seconds_count", **labels) == 1
    assert value(got, "arks_streamed_requests_total", namespace="default", model="qwen-7b") == 2


def test_deleted_endpoints_do_not_pile_up():
    for per_token in (False, True):
        metrics = GatewayMetrics(per_token=per_token)
        for number in range(50):
            done(metrics, endpoint=("default", f"m{number}"))
            metrics.rate_limited("default", f"m{number}", "rpm")
        metrics.retain([("default", "m7")], ())
        text = metrics.text()
        assert b'"m7"' in text
        assert b'"m8"' not in text


def test_deleted_tokens_do_not_pile_up_and_no_sum_falls():
    metrics = GatewayMetrics(per_token=True)
    for number in range(50):
        done(metrics, user=f"user-{number}")
        metrics.rate_limited("default", "qwen-7b", "rpm", f"user-{number}")
    before = read(metrics)
    metrics.retain([("default", "qwen-7b")], {("default", "user-7"): None, ("other", "user-8"): None})
    after = read(metrics)
    about = {"namespace": "default", "model": "qwen-7b"}
    for user, count in (("user-7", 1), ("", 49)):
        labels = {**about, "user": user}
        assert value(after, "gateway_requests_total", status="200", **labels) == count
        assert value(after, "gateway_request_duration_seconds_count", **labels) == count
        assert value(after, "gateway_rate_limit_hits_total", rule_type="rpm", **labels) == count
    assert "user-8" not in metrics.text().decode()
    for name in ("arks_streamed_requests_total", "arks_cached_prompt_tokens_total"):
        assert value(after, name, **about) == value(before, name, **about)


def test_names_with_quotes_and_line_ends_stay_one_label():
    metrics = GatewayMetrics()
    odd = 'a"b\\c\nd'
    done(metrics, endpoint=("default", odd))
    assert value(read(metrics), "gateway_requests_total", namespace="default", model=odd, status="200") == 1


def test_watched_values_are_read_at_the_scrape_and_a_broken_reader_costs_only_itself():
    metrics = GatewayMetrics()
    streams = 3

    def broken():
        raise RuntimeError

    metrics.watch(names.OPEN_STREAMS, lambda: streams)
    metrics.watch(names.POLICY_AGE, broken)
    metrics.watch(names.ENGINE_IN_FLIGHT, lambda: [(("10.0.0.1:8000",), 4), (("10.0.0.2:8000",), 0)])
    streams = 5
    got = read(metrics)
    assert value(got, "arks_open_streams") == 5
    assert value(got, "arks_engine_in_flight", engine="10.0.0.1:8000") == 4
    assert not [key for key in got if key[0] == "arks_policy_age_seconds"]


async def test_a_large_scrape_lets_requests_through_and_survives_new_series_meanwhile():
    metrics = GatewayMetrics()
    for number in range(200):
        done(metrics, endpoint=("default", f"m{number}"))
    served = 0

    async def serve():
        nonlocal served
        while True:
            served += 1
            done(metrics, endpoint=("default", f"new{served}"))
            metrics.refused("default", f"reason{served}")
            await asyncio.sleep(0)

    task = asyncio.create_task(serve())
    pieces = [piece async for piece in metrics.exposition()]
    task.cancel()
    assert len(pieces) > 3
    assert served >= len(pieces) - 1
    assert max(piece.count(b"\n") for piece in pieces[:-1]) < 4 * SLICE_LINES
    assert list(text_string_to_metric_families(b"".join(pieces).decode()))


def test_the_process_itself_is_measured():
    got = read(GatewayMetrics())
    assert value(got, "process_resident_memory_bytes") > 0


def test_every_metric_has_one_name_and_the_documentation_has_them_all(request):
    assert len({metric.name for metric in names.ALL}) == len(names.ALL)
    text = (request.config.rootpath / "docs" / "metrics.md").read_text()
    assert names.table() in text, "run python -m extproc.observe.names and paste its table into docs/metrics.md"
