"""Detects engines that stall: requests in flight, but no progress for a while. They are killed, and start again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from loguru import logger

from llm_api_server.engines.progress import progress
from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.instances.running_instances import RunningInstances

#: Probes of an engine within the timeout.
_PROBES = 4
_MAX_INTERVAL = 10.0


class StallDetector:
    """Kills instances without progress. `is_working`: an instance has requests whose clients read the response.

    `probe` returns the counters of the engine at an address, or None if it does not respond within a time.
    """

    def __init__(
        self,
        timeout: float,
        instances: RunningInstances,
        is_working: Callable[[str], bool],
        *,
        probe: Callable[[str, float], Awaitable[tuple[bytes, ...] | None]] = progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.configure(timeout)
        self._instances = instances
        self._is_working = is_working
        self._read_counters = probe
        self._clock = clock
        #: When each instance was last seen to make progress or to have nothing to do.
        self._progressed_at: dict[str, float] = {}
        self._counters: dict[str, tuple[bytes, ...]] = {}

    def configure(self, timeout: float) -> None:
        """Set the timeout in seconds; 0 turns the detection off."""
        self._timeout = timeout
        self._interval = min(_MAX_INTERVAL, timeout / _PROBES) if timeout else _MAX_INTERVAL

    async def run(self) -> None:
        """Probe the instances at regular intervals, until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.probe_all()

    async def probe_all(self) -> None:
        """Probe every ready instance once."""
        watched = [one for one in self._instances if one.may_stall and self._timeout]
        for gone in self._progressed_at.keys() - {one.id for one in watched}:
            del self._progressed_at[gone]
            self._counters.pop(gone, None)
        await asyncio.gather(*(self._probe(one) for one in watched))

    async def _probe(self, instance: Instance) -> None:
        now = self._clock()
        since = self._progressed_at.setdefault(instance.id, now)
        if not self._is_working(instance.id):
            self._progressed_at[instance.id] = now
            return
        assert instance.info is not None, "it is ready"
        counters = await self._read_counters(instance.info.address, self._interval)
        if counters is not None and counters != self._counters.get(instance.id):
            self._counters[instance.id] = counters
            self._progressed_at[instance.id] = now
            instance.progress_at = time.time()
        elif now - since >= self._timeout and self._is_working(instance.id) and instance.may_stall:
            logger.error("model {}: no progress for {:.0f} s with requests in flight", instance.model, now - since)
            instance.kill(f"it made no progress for {self._timeout:g} s (limits.stall_timeout) and was ended")
