"""Tells those who count and those who trace how instances came and went. On the manager's one loop."""

from __future__ import annotations

from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.scheduling.state import Allocation, Why
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.spans import Tracing

_REASONS = {Why.ROOM: "evicted", Why.ORDER: "ordered", None: "idle"}


class LoadReport:
    def __init__(self, tally: Counters, tracing: Tracing) -> None:
        self._tally = tally
        self._tracing = tracing

    def on_ready(self, instance: Instance) -> None:
        self._tally.loaded(instance.model, instance.load_seconds or 0.0, instance.phases.seconds)
        self._tracing.loaded(instance.as_load())

    def on_end(self, instance: Instance, booking: Allocation | None) -> None:
        """Its process is gone, whether it had been ready or not."""
        if instance.ready_at is None:
            result = "cancelled" if instance.is_stopping else "failed"
            self._tally.load_over(instance.model, result)
            self._tracing.loaded(instance.as_load(error=result))
            return
        reason = _REASONS[booking.why if booking is not None else None]
        self._tally.unloaded(instance.model, reason if instance.is_stopping else "failed")
