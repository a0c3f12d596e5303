"""Counts what the gateway does, and writes it as Prometheus reads it.

A request pays for a dictionary look-up, a few list increments and no allocation (`request_done`, below 1 us): counters
are plain numbers, a histogram is a list of counts over the *union* of all bounds that some metric asks of the value,
so that one bisection serves Arks' and OpenTelemetry's metrics alike. Everything else happens at a scrape, in slices of
a few milliseconds, so that a scrape of a thousand endpoints does not hold up a request.

All methods run on the event loop. Nothing here can fail a request: labels are resources' names, values are numbers.
"""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest

from extproc.ledger.model import UsageRecord
from extproc.observe import exposition as text
from extproc.observe import names
from extproc.observe.names import MetricName

EndpointKey: TypeAlias = tuple[str, str]
Reading: TypeAlias = float | Iterable[tuple[tuple[str, ...], float]]
"""one value, or one per tuple of label values (in the order of the metric's `labels`); an iterator is read slice by
slice"""

_Key = TypeVar("_Key")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SLICE_LINES = 2000
"""lines written between two looks at the event loop: about 2 ms"""

_DURATION_BOUNDS = tuple(sorted({*names.REQUEST_DURATION.buckets, *names.GEN_AI_DURATION.buckets}))
_RESPONSE_BOUNDS = tuple(bound / 1000 for bound in names.RESPONSE_DURATION_MS.buckets)
_TTFT_BOUNDS = names.GEN_AI_TTFT.buckets
_TPOT_BOUNDS = names.GEN_AI_TPOT.buckets
# Token bounds are powers of two in both families: the bucket's index is the number's bit length.
_TOKEN_POWERS = 27
_TOKEN_BOUNDS = tuple(float(2**power) for power in range(_TOKEN_POWERS))
_TOKEN_MAX = 2 ** (_TOKEN_POWERS - 1)


class _Series:
    """What was counted for one endpoint, operation and, where wanted, token."""

    __slots__ = (
        "cached",
        "completion",
        "completion_sum",
        "duration",
        "duration_sum",
        "errors",
        "estimated",
        "exact",
        "prompt",
        "prompt_sum",
        "response",
        "response_sum",
        "statuses",
        "streamed",
        "tpot",
        "tpot_sum",
        "ttft",
        "ttft_sum",
    )

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.duration = [0] * (len(_DURATION_BOUNDS) + 1)
        self.duration_sum = 0.0
        self.response = [0] * (len(_RESPONSE_BOUNDS) + 1)
        self.response_sum = 0.0
        self.ttft = [0] * (len(_TTFT_BOUNDS) + 1)
        self.ttft_sum = 0.0
        self.tpot = [0] * (len(_TPOT_BOUNDS) + 1)
        self.tpot_sum = 0.0
        self.prompt = [0] * (_TOKEN_POWERS + 1)
        self.prompt_sum = 0
        self.completion = [0] * (_TOKEN_POWERS + 1)
        self.completion_sum = 0
        self.cached = 0
        self.exact = 0
        self.estimated = 0
        self.streamed = 0

    def add(self, other: "_Series") -> None:
        """Count here what was counted there."""
        for name in self.__slots__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if isinstance(ours, dict):
                theirs = _sum_dicts((ours, theirs))
            elif isinstance(ours, list):
                theirs = _sum_lists([ours, theirs])
            else:
                theirs += ours
            setattr(self, name, theirs)


class GatewayMetrics:
    """The process's counters. One per process; `exposition` is what `/metrics` answers."""

    def __init__(self, *, per_token: bool = False) -> None:
        self._per_token = per_token
        self.ended: list[UsageRecord] = []
        """ended requests that are not counted yet. A request pays for this append only: counting many in one go costs
        half of counting each amid other work, since the code stays in the processor's caches"""
        self._series: dict[str, dict[Any, _Series]] = {}
        """by operation, then by EndpointKey or, per token, (EndpointKey, user)"""
        self._refused: dict[tuple[str, str], int] = {}
        self._rate_limited: dict[tuple[str, str, str, str], int] = {}
        self._watched: list[tuple[MetricName, Callable[[], Reading]]] = []
        self._process = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)

    def count_ended(self) -> None:
        """Count what has ended. Called every quarter of a second, and before a scrape."""
        ended, self.ended = self.ended, []
        for row in ended:
            self.request_done(
                (row.namespace, row.endpoint),
                row.status,
                row.error,
                row.duration_ms / 1000,
                None if row.ttft_ms is None else row.ttft_ms / 1000,
                row.prompt_tokens,
                row.completion_tokens,
                row.cached_tokens,
                row.accuracy,
                row.stream,
                row.api,
                row.token,
            )

    def request_done(
        self,
        endpoint: EndpointKey,
        status: int,
        reason: str,
        duration_s: float,
        ttft_s: float | None,
        prompt: int,
        completion: int,
        cached: int,
        accuracy: str,
        stream: bool,
        operation: str = "chat",
        user: str = "",
    ) -> None:
        """An admitted request has ended and is settled. Once per request, whatever its attempts.

        `endpoint` is the resource's (namespace, name); `reason` is the stable error reason, empty for success;
        `operation` one of the APIs' names (chat, completions, embeddings, ...); `user` the token's name.
        """
        key = (endpoint, user) if self._per_token else endpoint
        try:
            series = self._series[operation][key]
        except KeyError:
            series = self._series.setdefault(operation, {}).setdefault(key, _Series())
        statuses = series.statuses
        statuses[status] = statuses.get(status, 0) + 1
        series.duration[bisect_left(_DURATION_BOUNDS, duration_s)] += 1
        series.duration_sum += duration_s
        if accuracy == "exact":
            series.exact += 1
        else:
            series.estimated += 1
        if prompt or completion:
            series.prompt[(prompt - 1).bit_length() if 0 < prompt <= _TOKEN_MAX else _edge(prompt)] += 1
            series.prompt_sum += prompt
            series.completion[(completion - 1).bit_length() if 0 < completion <= _TOKEN_MAX else _edge(completion)] += 1
            series.completion_sum += completion
            series.cached += cached
        if ttft_s is not None:
            series.ttft[bisect_left(_TTFT_BOUNDS, ttft_s)] += 1
            series.ttft_sum += ttft_s
            answering_s = duration_s - ttft_s
            series.response[bisect_left(_RESPONSE_BOUNDS, answering_s)] += 1
            series.response_sum += answering_s
            if stream and completion > 1:
                tpot_s = answering_s / (completion - 1)
                series.tpot[bisect_left(_TPOT_BOUNDS, tpot_s)] += 1
                series.tpot_sum += tpot_s
        if stream:
            series.streamed += 1
        if reason:
            series.errors[reason] = series.errors.get(reason, 0) + 1

    def refused(self, namespace: str, reason: str) -> None:
        """A request was answered with an error before any engine was asked. `namespace` is empty without a token."""
        key = (namespace, reason)
        self._refused[key] = self._refused.get(key, 0) + 1

    def rate_limited(self, namespace: str, model: str, rule_kind: str, user: str = "") -> None:
        """A limit or quota refused a request. Counts the rule only: call `refused` as well, for the request."""
        key = (namespace, model, rule_kind, user if self._per_token else "")
        self._rate_limited[key] = self._rate_limited.get(key, 0) + 1

    def watch(self, metric: MetricName, read: Callable[[], Reading]) -> None:
        """Ask `read` for the metric's value at each scrape. One that raises is left out of that scrape."""
        self._watched.append((metric, read))

    def retain(self, endpoints: Iterable[EndpointKey], tokens: Collection[EndpointKey]) -> None:
        """Forget the series of endpoints that are not among these: deleted models must not pile up for ever.

        Nor must deleted tokens, whose `user` they carry: they are counted on together, as nobody's, so that no sum
        over a model's users falls. Both are (namespace, name).
        """
        keep = set(endpoints)
        for by_key in self._series.values():
            for key in list(by_key):
                endpoint, user = key if self._per_token else (key, "")
                if endpoint not in keep:
                    del by_key[key]
                elif user and (endpoint[0], user) not in tokens:
                    by_key.setdefault((endpoint, ""), _Series()).add(by_key.pop(key))
        models = keep | {(namespace, "") for namespace, _ in keep}
        for limited in list(self._rate_limited):
            namespace, model, kind, user = limited
            if (namespace, model) not in models:
                del self._rate_limited[limited]
            elif user and (namespace, user) not in tokens:
                nobody = (namespace, model, kind, "")
                self._rate_limited[nobody] = self._rate_limited.get(nobody, 0) + self._rate_limited.pop(limited)

    async def exposition(self) -> AsyncIterator[bytes]:
        """The scrape, in slices between which the event loop serves requests."""
        lines: list[str] = []
        for line in self._lines():
            lines.append(line)
            if len(lines) >= SLICE_LINES:
                yield "".join(lines).encode()
                lines.clear()
                await asyncio.sleep(0)
        yield "".join(lines).encode() + generate_latest(self._process)

    def text(self) -> bytes:
        """The whole scrape at once, for tools and tests."""
        return "".join(self._lines()).encode() + generate_latest(self._process)

    def _lines(self) -> Iterator[str]:
        self.count_ended()
        # Materialised before the first slice: requests that come between two slices may add series.
        rows = [
            (operation, *self._split(key), series)
            for operation, by_key in self._series.items()
            for key, series in by_key.items()
        ]
        by_model: dict[tuple[str, str, str], list[_Series]] = {}
        for _, namespace, model, user, series in rows:
            by_model.setdefault((namespace, model, user), []).append(series)

        yield from self._arks_counters(by_model)
        yield from self._arks_histograms(by_model)
        yield from self._gen_ai([(operation, ns, model, user, series) for operation, ns, model, user, series in rows])
        yield from text.head(names.REFUSED)
        for (namespace, reason), count in list(self._refused.items()):
            yield text.line(names.REFUSED.name, text.labels(names.REFUSED, (namespace, reason)), count)
        for metric, read in self._watched:
            yield from _watched(metric, read)

    def _split(self, key: Any) -> tuple[str, str, str]:
        (namespace, model), user = key if self._per_token else (key, "")
        return namespace, model, user

    def _user(self, user: str) -> str:
        return f'user="{text.escape(user)}",' if self._per_token else ""

    def _arks_counters(self, by_model: dict[tuple[str, str, str], list[_Series]]) -> Iterator[str]:
        yield from text.head(names.REQUESTS)
        for (namespace, model, user), group in by_model.items():
            for status, count in sorted(_sum_dicts(series.statuses for series in group).items()):
                labels = self._user(user) + text.labels(names.REQUESTS, (namespace, model, str(status)))
                yield text.line(names.REQUESTS.name, labels, count)
        yield from text.head(names.TOKEN_USAGE)
        for (namespace, model, user), group in by_model.items():
            for kind, count in (
                ("input", sum(series.prompt_sum for series in group)),
                ("output", sum(series.completion_sum for series in group)),
            ):
                labels = self._user(user) + text.labels(names.TOKEN_USAGE, (namespace, model, kind))
                yield text.line(names.TOKEN_USAGE.name, labels, count)
        yield from text.head(names.RATE_LIMIT_HITS)
        for (namespace, model, kind, user), count in list(self._rate_limited.items()):
            labels = self._user(user) + text.labels(names.RATE_LIMIT_HITS, (namespace, model, kind))
            yield text.line(names.RATE_LIMIT_HITS.name, labels, count)

        # The rest is never per token.
        endpoints: dict[tuple[str, str], list[_Series]] = {}
        for (namespace, model, _), group in by_model.items():
            endpoints.setdefault((namespace, model), []).extend(group)
        yield from text.head(names.ERRORS)
        for key, group in endpoints.items():
            for reason, count in sorted(_sum_dicts(series.errors for series in group).items()):
                yield text.line(names.ERRORS.name, text.labels(names.ERRORS, (*key, reason)), count)
        for (namespace, reason), count in list(self._refused.items()):
            yield text.line(names.ERRORS.name, text.labels(names.ERRORS, (namespace, "", reason)), count)
        yield from text.head(names.CACHED_TOKENS)
        for key, group in endpoints.items():
            cached = sum(series.cached for series in group)
            yield text.line(names.CACHED_TOKENS.name, text.labels(names.CACHED_TOKENS, key), cached)
        yield from text.head(names.STREAMED)
        for key, group in endpoints.items():
            streamed = sum(series.streamed for series in group)
            yield text.line(names.STREAMED.name, text.labels(names.STREAMED, key), streamed)
        yield from text.head(names.USAGE_ACCURACY)
        for key, group in endpoints.items():
            for accuracy, count in (
                ("exact", sum(series.exact for series in group)),
                ("estimated", sum(series.estimated for series in group)),
            ):
                yield text.line(names.USAGE_ACCURACY.name, text.labels(names.USAGE_ACCURACY, (*key, accuracy)), count)

    def _arks_histograms(self, by_model: dict[tuple[str, str, str], list[_Series]]) -> Iterator[str]:
        yield from text.head(names.REQUEST_DURATION)
        for (namespace, model, user), group in by_model.items():
            labels = self._user(user) + text.labels(names.REQUEST_DURATION, (namespace, model))
            counts = _sum_lists([series.duration for series in group])
            total = sum(series.duration_sum for series in group)
            yield from text.histogram(names.REQUEST_DURATION, labels, _DURATION_BOUNDS, counts, total)
        yield from text.head(names.RESPONSE_DURATION_MS)
        bounds_ms = names.RESPONSE_DURATION_MS.buckets
        for (namespace, model, user), group in by_model.items():
            labels = self._user(user) + text.labels(names.RESPONSE_DURATION_MS, (namespace, model))
            counts = _sum_lists([series.response for series in group])
            total = 1000 * sum(series.response_sum for series in group)
            yield from text.histogram(names.RESPONSE_DURATION_MS, labels, bounds_ms, counts, total)
        yield from text.head(names.TOKEN_DISTRIBUTION)
        for (namespace, model, user), group in by_model.items():
            for kind, counts, total in (
                ("input", _sum_lists([s.prompt for s in group]), sum(s.prompt_sum for s in group)),
                ("output", _sum_lists([s.completion for s in group]), sum(s.completion_sum for s in group)),
            ):
                labels = self._user(user) + text.labels(names.TOKEN_DISTRIBUTION, (namespace, model, kind))
                yield from text.histogram(names.TOKEN_DISTRIBUTION, labels, _TOKEN_BOUNDS, counts, total)

    def _gen_ai(self, rows: list[tuple[str, str, str, str, _Series]]) -> Iterator[str]:
        groups: dict[tuple[str, str, str], list[_Series]] = {}
        for operation, namespace, model, _, series in rows:
            groups.setdefault((operation, model, namespace), []).append(series)
        yield from text.head(names.GEN_AI_DURATION)
        for key, group in groups.items():
            labels = text.labels(names.GEN_AI_DURATION, key)
            counts = _sum_lists([s.duration for s in group])
            total = sum(s.duration_sum for s in group)
            yield from text.histogram(names.GEN_AI_DURATION, labels, _DURATION_BOUNDS, counts, total)
        yield from text.head(names.GEN_AI_TTFT)
        for key, group in groups.items():
            labels = text.labels(names.GEN_AI_TTFT, key)
            counts = _sum_lists([s.ttft for s in group])
            yield from text.histogram(names.GEN_AI_TTFT, labels, _TTFT_BOUNDS, counts, sum(s.ttft_sum for s in group))
        yield from text.head(names.GEN_AI_TPOT)
        for key, group in groups.items():
            labels = text.labels(names.GEN_AI_TPOT, key)
            counts = _sum_lists([s.tpot for s in group])
            yield from text.histogram(names.GEN_AI_TPOT, labels, _TPOT_BOUNDS, counts, sum(s.tpot_sum for s in group))
        yield from text.head(names.GEN_AI_TOKENS)
        for (operation, model, namespace), group in groups.items():
            for kind, counts, tokens in (
                ("input", _sum_lists([s.prompt for s in group]), sum(s.prompt_sum for s in group)),
                ("output", _sum_lists([s.completion for s in group]), sum(s.completion_sum for s in group)),
            ):
                labels = text.labels(names.GEN_AI_TOKENS, (operation, model, kind, namespace))
                yield from text.histogram(names.GEN_AI_TOKENS, labels, _TOKEN_BOUNDS, counts, tokens)


def _edge(tokens: int) -> int:
    """Bucket of a count that has no bit length to go by: none at all, or more than the largest bound."""
    return 0 if tokens <= 0 else _TOKEN_POWERS


def _sum_lists(lists: list[list[int]]) -> list[int]:
    return lists[0] if len(lists) == 1 else [sum(column) for column in zip(*lists, strict=True)]


def _sum_dicts(dicts: Iterable[dict[_Key, int]]) -> dict[_Key, int]:
    total: dict[_Key, int] = {}
    for counts in dicts:
        for key, count in counts.items():
            total[key] = total.get(key, 0) + count
    return total


def _watched(metric: MetricName, read: Callable[[], Reading]) -> Iterator[str]:
    try:
        reading = read()
        if isinstance(reading, Iterator):
            yield from text.head(metric)
            for labels, value in reading:
                yield text.line(metric.name, text.labels(metric, labels), value)
            return
        values = [((), float(reading))] if isinstance(reading, int | float) else list(reading)
        lines = [text.line(metric.name, text.labels(metric, tuple(labels)), value) for labels, value in values]
    except Exception:  # one reader's fault must not take the whole scrape away
        return
    yield from text.head(metric)
    yield from lines
