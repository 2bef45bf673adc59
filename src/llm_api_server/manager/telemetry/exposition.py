"""Text of `/metrics`: the counters, the state of the server now, and the metrics of the engines.

Engines' own metrics keep their names and get the label `model`. They are fetched for every text, within
`ENGINE_TIMEOUT`; an engine that does not respond is left out.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llm_api_server import __version__
from llm_api_server.engines.readiness import ProbeFailed, request
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.manager.instances.process import proportional_size
from llm_api_server.manager.telemetry import metrics
from llm_api_server.manager.telemetry.counters import Counters, Labels
from llm_api_server.manager.telemetry.metrics import Metric

ENGINE_TIMEOUT = 2.0
_OK = 200
#: Prefixes of both engines' metrics; what else they export comes from their libraries.
_OF_ENGINES = re.compile(r"(?:vllm|llamacpp):")
#: Labels in which engines name the model themselves.
_OWN_NAMES = {"model_name", "model"}

Values = dict[Labels, float]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """State of the server at one moment. `workers` are process ids."""

    models: Sequence[ModelStatus]
    devices: Sequence[DeviceStatus]
    engines: Sequence[InstanceInfo]
    workers: list[int]
    is_store_up: bool
    waiting_reports: int


class Exposition:
    """Renders `/metrics` from the counters and a snapshot of the server."""

    def __init__(self, counters: Counters, snapshot: Callable[[], Awaitable[Snapshot]]) -> None:
        self._counters = counters
        self._snapshot = snapshot

    async def text(self) -> str:
        state = await self._snapshot()
        engines = await asyncio.gather(*(_engine_text(info) for info in state.engines))
        values = {**self._counters.counts(), **_gauges(state)}
        histograms = _histograms(self._counters)

        def render() -> str:
            values.update(_process_values({"manager": [os.getpid()], "workers": state.workers}))
            families = [_family(metric, values[metric]) for metric in metrics.METRICS if metric in values]
            return text_of([*families, *histograms, *_engine_families(engines)])

        # In a thread: an engine's text can have thousands of lines.
        return await asyncio.to_thread(render)


def _gauges(state: Snapshot) -> dict[Metric, Values]:
    return {
        metrics.RUNNING: {(one.id,): float(one.in_flight) for one in state.models},
        metrics.WAITING: {(one.id,): float(one.queued) for one in state.models},
        metrics.MODEL_STATE: {(one.id, str(one.state)): 1.0 for one in state.models},
        metrics.MODEL_MEMORY: {(one.id,): float(one.memory_bytes) for one in state.models if one.memory_bytes},
        metrics.DEVICE_MEMORY: {
            (device.id, kind): float(value)
            for device in state.devices
            for kind, value in (
                ("total", device.total),
                ("limit", device.limit),
                ("taken", sum(device.taken.values())),
                ("foreign", device.foreign),
                ("free", device.free),
            )
        },
        metrics.WORKERS: {(): float(len(state.workers))},
        metrics.STORE_UP: {(): float(state.is_store_up)},
        metrics.STORE_WAITING: {(): float(state.waiting_reports)},
        metrics.BUILD: {(__version__,): 1.0},
    }


def text_of(families: Iterable[Family]) -> str:
    """Return the families in Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(families)))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _family(metric: Metric, values: Values) -> Family:
    of_kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = of_kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histograms(counters: Counters) -> list[Family]:
    families: dict[Metric, HistogramMetricFamily] = {}
    for metric, labels, buckets in counters.times():
        if metric not in families:
            families[metric] = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        families[metric].add_metric(labels, buckets.cumulative(), buckets.total)
    return list(families.values())


def _process_values(processes: dict[str, list[int]]) -> dict[Metric, Values]:
    """Return memory, CPU seconds and descriptors of groups of processes; one that is gone counts as nothing."""
    found: dict[Metric, Values] = {metrics.PROCESS_MEMORY: {}, metrics.PROCESS_CPU: {}, metrics.PROCESS_FDS: {}}
    for name, pids in processes.items():
        cpu, descriptors = 0.0, 0
        for pid in pids:
            try:
                process = psutil.Process(pid)
                times = process.cpu_times()
                cpu += times.user + times.system
                descriptors += process.num_fds()
            except psutil.Error:
                continue
        found[metrics.PROCESS_MEMORY][name,] = float(sum(proportional_size(pid) or 0 for pid in pids))
        found[metrics.PROCESS_CPU][name,] = cpu
        found[metrics.PROCESS_FDS][name,] = float(descriptors)
    return found


async def _engine_text(info: InstanceInfo) -> tuple[str, str]:
    """Return the model's name and its engine's metrics, empty if there are none."""
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT):
            response = await request(info.address, "GET", "/metrics")
    except (ProbeFailed, TimeoutError):
        return info.model, ""
    return info.model, response.body.decode("utf-8", "replace") if response.status == _OK else ""


def _engine_families(texts: Iterable[tuple[str, str]]) -> Iterator[Family]:
    """Merge the engines' metrics: each family once, with the samples of all models."""
    families: dict[str, Family] = {}
    for model, text in texts:
        try:
            parsed = list(text_string_to_metric_families(text))
        except ValueError:
            continue
        for found in parsed:
            if not _OF_ENGINES.match(found.name) or found.name.endswith("_created"):
                continue
            family = families.setdefault(found.name, Family(found.name, found.documentation, found.type))
            for sample in found.samples:
                labels = {name: value for name, value in sample.labels.items() if name not in _OWN_NAMES}
                family.add_sample(sample.name, {**labels, "model": model}, sample.value)
    yield from families.values()
