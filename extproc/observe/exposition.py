"""Prometheus' text format, line by line: for counters that are kept as plain numbers."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.utils import floatToGoString

from extproc.observe.names import MetricName


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def labels(metric: MetricName, values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{escape(value)}"' for name, value in zip(metric.labels, values, strict=True))


def head(metric: MetricName) -> Iterator[str]:
    yield f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"


def line(name: str, labels: str, value: float) -> str:
    return f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n"


def histogram(
    metric: MetricName, labels: str, bounds: tuple[float, ...], counts: list[int], total: float
) -> Iterator[str]:
    """One histogram's lines; `bounds` may be finer than the metric's own buckets."""
    below = list(accumulate(counts))
    for bucket in metric.buckets:
        count = below[bisect_left(bounds, bucket)]
        yield f'{metric.name}_bucket{{{labels},le="{_bound(bucket)}"}} {count}\n'
    yield f'{metric.name}_bucket{{{labels},le="+Inf"}} {below[-1]}\n'
    yield f"{metric.name}_sum{{{labels}}} {total}\n{metric.name}_count{{{labels}}} {below[-1]}\n"


def _bound(bucket: float) -> str:
    return str(floatToGoString(bucket))  # type: ignore[no-untyped-call]
