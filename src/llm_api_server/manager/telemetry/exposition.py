"""The text of `/metrics`: what `Counters` has counted, what is so now, and what the engines say of themselves.

Engines' own metrics keep their names and get the label `model`; they are asked when somebody asks here, at most
`ENGINE_TIMEOUT` seconds, and one that does not answer is left out.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from llm_api_server import __version__
from llm_api_server.engines.readiness import ProbeFailed, request
from llm_api_server.ipc import lease_messages, messages
from llm_api_server.manager.instances.process import proportional_size
from llm_api_server.manager.telemetry import metrics
from llm_api_server.manager.telemetry.counters import Counters, Labels
from llm_api_server.manager.telemetry.metrics import Metric

if TYPE_CHECKING:
    from llm_api_server.manager.manager import Manager
    from llm_api_server.manager.usage.usage_writer import UsageWriter
    from llm_api_server.manager.worker_session import WorkerSession

ENGINE_TIMEOUT = 2.0
#: What both engines call their metrics; anything else they say is the business of their libraries.
_OF_ENGINES = re.compile(r"(?:vllm|llamacpp):")
#: Names of the model in the engine's own words.
_OWN_NAMES = {"model_name", "model"}
_TICKS = os.sysconf("SC_CLK_TCK")

Values = dict[Labels, float]


class Exposition:
    """Built by `main`; answers `GetMetrics`."""

    def __init__(self, manager: Manager, accounts: UsageWriter) -> None:
        self._manager = manager
        self._accounts = accounts

    async def tell(self, client: WorkerSession, number: int) -> None:
        engines = await asyncio.gather(*(_ask(info) for info in self._manager.board.engines()))
        await self._manager.board.measure()
        here, counts = self._here(), self._manager.tally.counts()
        histograms = _histograms(self._manager.tally)
        processes = {"manager": [os.getpid()], "workers": self._manager.workers}

        def render() -> str:
            """In a thread: an engine's text can have thousands of lines."""
            values = {**counts, **here, **_of_processes(processes)}
            families = [_family(metric, values[metric]) for metric in metrics.METRICS if metric in values]
            return text_of([*families, *histograms, *_of_engines(engines)])

        client.send(messages.MetricsText(number, await asyncio.to_thread(render)))

    def _here(self) -> dict[Metric, Values]:
        """What is so now."""
        board, statuses = self._manager.board, self._manager.board.statuses()
        return {
            metrics.RUNNING: {(one.id,): float(one.in_flight) for one in statuses},
            metrics.WAITING: {(one.id,): float(one.queued) for one in statuses},
            metrics.MODEL_STATE: {(one.id, str(one.state)): 1.0 for one in statuses},
            metrics.MODEL_MEMORY: {(one.id,): float(one.memory_bytes) for one in statuses if one.memory_bytes},
            metrics.DEVICE_MEMORY: {
                (device.id, kind): float(value)
                for device in board.devices()
                for kind, value in (
                    ("total", device.total),
                    ("limit", device.limit),
                    ("taken", sum(device.taken.values())),
                    ("foreign", device.foreign),
                    ("free", device.free),
                )
            },
            metrics.WORKERS: {(): float(len(self._manager.workers))},
            metrics.STORE_UP: {(): float(self._accounts.is_store_up)},
            metrics.STORE_WAITING: {(): float(self._accounts.waiting_reports)},
            metrics.BUILD: {(__version__,): 1.0},
        }


def text_of(families: Iterable[Family]) -> str:
    """Prometheus' text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(families)))
    return generate_latest(registry).decode()


class _Given(Collector):
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


def _histograms(tally: Counters) -> list[Family]:
    families: dict[Metric, HistogramMetricFamily] = {}
    for metric, labels, buckets in tally.times():
        if metric not in families:
            families[metric] = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        families[metric].add_metric(labels, buckets.cumulative(), buckets.total)
    return list(families.values())


def _of_processes(processes: dict[str, list[int]]) -> dict[Metric, Values]:
    found: dict[Metric, Values] = {metrics.PROCESS_MEMORY: {}, metrics.PROCESS_CPU: {}, metrics.PROCESS_FDS: {}}
    for name, pids in processes.items():
        found[metrics.PROCESS_MEMORY][name,] = float(sum(proportional_size(pid) or 0 for pid in pids))
        found[metrics.PROCESS_CPU][name,] = sum(_cpu_seconds(pid) for pid in pids)
        found[metrics.PROCESS_FDS][name,] = float(sum(_open_descriptors(pid) for pid in pids))
    return found


def _cpu_seconds(pid: int) -> float:
    """Fields 14 and 15 of /proc/PID/stat (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _open_descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


async def _ask(info: lease_messages.InstanceInfo) -> tuple[str, str]:
    """The model's name and its engine's text, which is empty where there is none."""
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT):
            answer = await request(info.address, "GET", "/metrics")
    except (ProbeFailed, TimeoutError):
        return info.model, ""
    return info.model, answer.body.decode("utf-8", "replace") if answer.status == 200 else ""  # noqa: PLR2004


def _of_engines(texts: Iterable[tuple[str, str]]) -> Iterator[Family]:
    """All engines' families, each once, with the samples of all models."""
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
