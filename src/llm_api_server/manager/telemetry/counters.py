"""Counts of requests, loads and limits since this manager started, for `/metrics`. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from llm_api_server.ipc.usage_events import CLIENT_CLOSED, Batch, FinishedRequest
from llm_api_server.manager.telemetry import metrics
from llm_api_server.manager.telemetry.metrics import MAX_KEYS, OTHER_KEYS, Metric

Labels = tuple[str, ...]
#: Endpoint, model, key, whether it streams, status and error.
_Group = tuple[str, str, str, bool, int, str | None]


class Buckets:
    """Counts of values between the bounds of a histogram, and their sum; the last count is above all bounds."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, values: Sequence[float]) -> None:
        for index, count in Counter(map(bisect_left, repeat(self._bounds), values)).items():
            self.counts[index] += count
        self.total += sum(values)

    def cumulative(self) -> list[tuple[str, float]]:
        """Return each bound with the number of values up to it, as Prometheus expects."""
        found, count = [], 0
        for bound, here in zip((*self._bounds, "+Inf"), self.counts, strict=True):
            count += here
            found.append((str(bound), float(count)))
        return found


@dataclass(slots=True)
class _Sums:
    """Sums over requests with the same labels."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(slots=True)
class _ModelTimes:
    queue: Buckets = field(default_factory=lambda: Buckets(metrics.QUEUE_SECONDS.buckets))
    first_token: Buckets = field(default_factory=lambda: Buckets(metrics.FIRST_TOKEN_SECONDS.buckets))
    inter_token: Buckets = field(default_factory=lambda: Buckets(metrics.INTER_TOKEN_SECONDS.buckets))


class Counters:
    """Counters (`counts`) and histograms (`times`) of the manager.

    They are added by batch: 1.1 us per request of a batch of 1,000, where the metric types of prometheus_client take
    15 us for one request after the other, and 5 us if its counters are added by batch (process time, Python 3.11).
    """

    def __init__(self) -> None:
        self._last_report: dict[str, int] = {}
        self._keys: set[str] = set()
        self._sums: defaultdict[tuple[str, str, str, int, str], _Sums] = defaultdict(_Sums)
        self._seconds: dict[tuple[str, str], Buckets] = {}
        self._times: defaultdict[str, _ModelTimes] = defaultdict(_ModelTimes)
        self._aborted: defaultdict[str, int] = defaultdict(int)
        self._events: defaultdict[tuple[Metric, Labels], int] = defaultdict(int)
        self._loads: dict[tuple[Metric, Labels], Buckets] = {}

    def report(self, worker: str, number: int, batch: Batch, ended: Iterable[FinishedRequest]) -> bool:
        """Count a worker's batch, with the requests that it `ended`; return False for one that was counted before."""
        if number <= self._last_report.get(worker, 0):
            return False
        self._last_report[worker] = number
        self.settle(batch.finished)
        for one in batch.others:
            labels = one.endpoint, one.model, self._key_label(one.key_name), one.status, one.error
            self._sums[labels].requests += one.count
        self.settle(ended)
        return True

    def settle(self, requests: Iterable[FinishedRequest]) -> None:
        """Count finished requests, grouped by labels: they come by the thousand, and most share their labels."""
        groups: defaultdict[_Group, list[FinishedRequest]] = defaultdict(list)
        for one in requests:
            groups[one.endpoint, one.model, one.key_name, one.stream, one.status, one.error].append(one)
        for labels, group in groups.items():
            self._count(labels, group)

    def forget(self, worker: str) -> None:
        """Drop the report number of a worker that is gone."""
        self._last_report.pop(worker, None)

    def limit_hit(self, key: str, limit: str) -> None:
        self._events[metrics.LIMIT_HITS, (self._key_label(key), limit)] += 1

    def load_over(self, model: str, result: str) -> None:
        self._events[metrics.LOADS, (model, result)] += 1

    def loaded(self, model: str, seconds: float, phases: Mapping[str, float]) -> None:
        self.load_over(model, "ok")
        self._observe(metrics.LOAD_SECONDS, seconds, model)
        for phase, duration in phases.items():
            self._observe(metrics.PHASE_SECONDS, duration, model, phase)

    def unloaded(self, model: str, reason: str) -> None:
        self._events[metrics.UNLOADS, (model, reason)] += 1

    def _count(self, labels: _Group, group: Sequence[FinishedRequest]) -> None:
        endpoint, model, key, stream, status, error = labels
        sums = self._sums[endpoint, model, self._key_label(key), status, error or ""]
        usages = [one.usage for one in group]
        completion = sum([usage.completion_tokens for usage in usages])
        sums.requests += len(group)
        sums.prompt += sum([usage.prompt_tokens for usage in usages])
        sums.completion += completion
        sums.cached += sum([usage.cached_tokens for usage in usages])
        sums.reasoning += sum([usage.reasoning_tokens for usage in usages])
        if error == CLIENT_CLOSED:
            self._aborted[model] += completion
        if (endpoint, model) not in self._seconds:
            self._seconds[endpoint, model] = Buckets(metrics.REQUEST_SECONDS.buckets)
        self._seconds[endpoint, model].observe([one.duration for one in group])
        times = self._times[model]
        times.queue.observe([one.queued for one in group if one.queued is not None])
        if stream:
            streams = [(one, one.first_token) for one in group if one.first_token is not None]
            times.first_token.observe([first for _, first in streams])
            rest = [(one.duration - first, one.usage.completion_tokens - 1) for one, first in streams]
            times.inter_token.observe([seconds / tokens for seconds, tokens in rest if tokens > 0])

    def _key_label(self, key: str) -> str:
        """Return the key's name, or `OTHER_KEYS` beyond `MAX_KEYS`."""
        if key in self._keys:
            return key
        if len(self._keys) >= MAX_KEYS:
            return OTHER_KEYS
        self._keys.add(key)
        return key

    def _observe(self, metric: Metric, value: float, *labels: str) -> None:
        if (metric, labels) not in self._loads:
            self._loads[metric, labels] = Buckets(metric.buckets)
        self._loads[metric, labels].observe([value])

    def counts(self) -> dict[Metric, dict[Labels, float]]:
        """Return all counters by their labels."""
        found: defaultdict[Metric, defaultdict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        for (endpoint, model, key, status, error), sums in self._sums.items():
            found[metrics.REQUESTS][endpoint, model, key, str(status)] += sums.requests
            if error:
                found[metrics.ERRORS][endpoint, model, error] += sums.requests
            for kind in ("prompt", "completion", "cached", "reasoning"):
                if model and (count := getattr(sums, kind)):
                    found[metrics.TOKENS][model, key, kind] += count
        for model, tokens in self._aborted.items():
            found[metrics.ABORTED_TOKENS][model,] += tokens
        for (metric, labels), count in self._events.items():
            found[metric][labels] += count
        return {metric: dict(values) for metric, values in found.items()}

    def times(self) -> Iterator[tuple[Metric, Labels, Buckets]]:
        """Return all histograms, those of one metric in a row."""
        yield from ((metrics.REQUEST_SECONDS, labels, buckets) for labels, buckets in self._seconds.items())
        for metric, name in (
            (metrics.QUEUE_SECONDS, "queue"),
            (metrics.FIRST_TOKEN_SECONDS, "first_token"),
            (metrics.INTER_TOKEN_SECONDS, "inter_token"),
        ):
            yield from ((metric, (model,), getattr(times, name)) for model, times in self._times.items())
        for metric in (metrics.LOAD_SECONDS, metrics.PHASE_SECONDS):
            yield from ((metric, labels, one) for (which, labels), one in self._loads.items() if which is metric)
