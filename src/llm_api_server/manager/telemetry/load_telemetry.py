"""Counts and traces how instances are loaded and unloaded. On the manager's loop."""

from __future__ import annotations

from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.scheduling.state import Allocation, DrainReason
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.tracing import Tracing

_REASONS = {DrainReason.EVICTION: "evicted", DrainReason.COMMAND: "ordered", None: "idle"}


class LoadTelemetry:
    """Reports each load, unload, sleep and wake to the counters and to the tracing."""

    def __init__(self, counters: Counters, tracing: Tracing) -> None:
        self._counters = counters
        self._tracing = tracing

    def on_ready(self, instance: Instance) -> None:
        self._counters.loaded(instance.model, instance.load_seconds or 0.0, instance.phases.seconds)
        self._tracing.loaded(instance.load_trace())

    def on_ended(self, instance: Instance, allocation: Allocation | None) -> None:
        """Report an instance whose process is gone, whether it became ready or not."""
        if instance.ready_at is None:
            result = "cancelled" if instance.is_stopping else "failed"
            self._counters.load_over(instance.model, result)
            self._tracing.loaded(instance.load_trace(error=result))
            return
        reason = _REASONS[allocation.drain_reason if allocation is not None else None]
        self._counters.unloaded(instance.model, reason if instance.is_stopping else "failed")

    def on_slept(self, instance: Instance) -> None:
        self._counters.unloaded(instance.model, "asleep")

    def on_woken(self, instance: Instance, *, is_awake: bool) -> None:
        self._counters.load_over(instance.model, "woken" if is_awake else "failed")
