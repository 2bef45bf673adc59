"""Counts what has happened since this manager began, for `/metrics`. Pure.

Requests come with the reports of all workers (`usage.py`), each once; loads and limits are told by those who see them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from llm_api_server.ipc.usage_events import CLIENT_CLOSED, Batch, Other, RequestEnded, RequestStarted, Whole
from llm_api_server.manager.telemetry import metrics
from llm_api_server.manager.telemetry.metrics import MAX_KEYS, OTHER_KEYS, Metric

Labels = tuple[str, ...]
#: Endpoint, model, key, whether it streams, status and error.
_Alike = tuple[str, str, str, bool, int, str | None]


class Buckets:
    """How many values fell between two bounds, and their sum. The last count is of those above all bounds."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, values: Sequence[float]) -> None:
        for place, count in Counter(map(bisect_left, repeat(self._bounds), values)).items():
            self.counts[place] += count
        self.total += sum(values)

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: bounds, and how many values were at most that."""
        found, count = [], 0
        for bound, here in zip((*self._bounds, "+Inf"), self.counts, strict=True):
            count += here
            found.append((str(bound), float(count)))
        return found


@dataclass(slots=True)
class _Same:
    """Requests that are alike in all labels."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(slots=True)
class _Times:
    """Of one model."""

    queue: Buckets = field(default_factory=lambda: Buckets(metrics.QUEUE_SECONDS.buckets))
    first_token: Buckets = field(default_factory=lambda: Buckets(metrics.FIRST_TOKEN_SECONDS.buckets))
    inter_token: Buckets = field(default_factory=lambda: Buckets(metrics.INTER_TOKEN_SECONDS.buckets))


class Counters:
    """`counts` gives all counters, `times` all histograms."""

    def __init__(self) -> None:
        self._last_report: dict[str, int] = {}
        self._keys: set[str] = set()
        self._same: defaultdict[tuple[str, str, str, int, str], _Same] = defaultdict(_Same)
        self._seconds: dict[tuple[str, str], Buckets] = {}
        self._times: defaultdict[str, _Times] = defaultdict(_Times)
        self._aborted: defaultdict[str, int] = defaultdict(int)
        self._events: defaultdict[tuple[Metric, Labels], int] = defaultdict(int)
        self._loads: dict[tuple[Metric, Labels], Buckets] = {}

    # ── what happens ──

    def report(
        self, worker: str, number: int, batch: Batch, begun: Iterable[tuple[RequestStarted | None, RequestEnded]]
    ) -> bool:
        """A worker's report. `begun` are those that ended, with their beginnings. Again, it counts nothing: False."""
        if number <= self._last_report.get(worker, 0):
            return False
        self._last_report[worker] = number
        self._count((whole, whole) for whole in batch.whole)
        for other in batch.others:
            self._count_other(other)
        self.settle(begun)
        return True

    def settle(self, ended: Iterable[tuple[RequestStarted | None, RequestEnded]]) -> None:
        """Requests that are over. Without its beginning, nothing is known of it but its end."""
        self._count((started or _UNKNOWN, end) for started, end in ended)

    def forget(self, worker: str) -> None:
        """It is gone, and reports nothing any more."""
        self._last_report.pop(worker, None)

    def limit_hit(self, key: str, limit: str) -> None:
        self._events[metrics.LIMIT_HITS, (self._known(key), limit)] += 1

    def load_over(self, model: str, result: str) -> None:
        self._events[metrics.LOADS, (model, result)] += 1

    def loaded(self, model: str, seconds: float, phases: Mapping[str, float]) -> None:
        self.load_over(model, "ok")
        self._observe(metrics.LOAD_SECONDS, seconds, model)
        for phase, duration in phases.items():
            self._observe(metrics.PHASE_SECONDS, duration, model, phase)

    def unloaded(self, model: str, reason: str) -> None:
        self._events[metrics.UNLOADS, (model, reason)] += 1

    def _count(self, requests: Iterable[tuple[RequestStarted | Whole, RequestEnded | Whole]]) -> None:
        """Beginnings and ends. They come by the thousand, and most are alike in all that tells them apart here."""
        alike: defaultdict[_Alike, list[RequestEnded | Whole]] = defaultdict(list)
        for begin, end in requests:
            alike[begin.endpoint, begin.model, begin.key_name, begin.stream, end.status, end.error].append(end)
        for kind, ends in alike.items():
            self._count_alike(kind, ends)

    def _count_alike(self, kind: _Alike, ends: Sequence[RequestEnded | Whole]) -> None:
        endpoint, model, key, stream, status, error = kind
        same = self._same[endpoint, model, self._known(key), status, error or ""]
        usages = [end.usage for end in ends]
        completion = sum([usage.completion_tokens for usage in usages])
        same.requests += len(ends)
        same.prompt += sum([usage.prompt_tokens for usage in usages])
        same.completion += completion
        same.cached += sum([usage.cached_tokens for usage in usages])
        same.reasoning += sum([usage.reasoning_tokens for usage in usages])
        if error == CLIENT_CLOSED:
            self._aborted[model] += completion
        where = endpoint, model
        if where not in self._seconds:
            self._seconds[where] = Buckets(metrics.REQUEST_SECONDS.buckets)
        self._seconds[where].observe([end.duration for end in ends])
        times = self._times[model]
        times.queue.observe([end.queued for end in ends if end.queued is not None])
        if stream:
            begun = [(end, end.first_token) for end in ends if end.first_token is not None]
            times.first_token.observe([first for _, first in begun])
            tokens = [(end.duration - first, end.usage.completion_tokens - 1) for end, first in begun]
            times.inter_token.observe([seconds / more for seconds, more in tokens if more > 0])

    def _count_other(self, other: Other) -> None:
        self._same[
            other.endpoint, other.model, self._known(other.key_name), other.status, other.error
        ].requests += other.count

    def _known(self, key: str) -> str:
        """Its name, or that of all others."""
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

    # ── what came of it ──

    def counts(self) -> dict[Metric, dict[Labels, float]]:
        """All counters, by their labels."""
        found: defaultdict[Metric, defaultdict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        for (endpoint, model, key, status, error), same in self._same.items():
            found[metrics.REQUESTS][endpoint, model, key, str(status)] += same.requests
            if error:
                found[metrics.ERRORS][endpoint, model, error] += same.requests
            for kind in ("prompt", "completion", "cached", "reasoning"):
                if model and (count := getattr(same, kind)):
                    found[metrics.TOKENS][model, key, kind] += count
        for model, tokens in self._aborted.items():
            found[metrics.ABORTED_TOKENS][model,] += tokens
        for (metric, labels), count in self._events.items():
            found[metric][labels] += count
        return {metric: dict(values) for metric, values in found.items()}

    def times(self) -> Iterator[tuple[Metric, Labels, Buckets]]:
        """All histograms; those of one metric one after the other."""
        yield from ((metrics.REQUEST_SECONDS, labels, buckets) for labels, buckets in self._seconds.items())
        for metric, name in (
            (metrics.QUEUE_SECONDS, "queue"),
            (metrics.FIRST_TOKEN_SECONDS, "first_token"),
            (metrics.INTER_TOKEN_SECONDS, "inter_token"),
        ):
            yield from ((metric, (model,), getattr(times, name)) for model, times in self._times.items())
        for metric in (metrics.LOAD_SECONDS, metrics.PHASE_SECONDS):
            yield from ((metric, labels, one) for (which, labels), one in self._loads.items() if which is metric)


#: Of a row that an earlier manager was told of.
_UNKNOWN = RequestStarted(row="", request_id="", key_id="", key_name="", model="", endpoint="", stream=False, at=0.0)
