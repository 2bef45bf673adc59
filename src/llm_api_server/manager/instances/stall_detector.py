"""Finds engines that hang: at work for a while without a step, a token or an answer. They are killed and start anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from loguru import logger

from llm_api_server.engines.progress import progress
from llm_api_server.manager.instances.instance import Instance

#: Looks at an engine within the time that it may stand still.
_LOOKS = 4
_LONGEST_INTERVAL = 10.0


class StallDetector:
    """`is_at_work` tells whether an instance has requests whose clients read what it says."""

    def __init__(self, timeout: float, running: Mapping[str, Instance], is_at_work: Callable[[str], bool]) -> None:
        self.configure(timeout)
        self._running = running
        self._is_at_work = is_at_work
        self._since: dict[str, float] = {}
        self._seen: dict[str, tuple[bytes, ...]] = {}

    def configure(self, timeout: float) -> None:
        """`timeout` in seconds; 0: nothing is watched."""
        self._timeout = timeout
        self._interval = min(_LONGEST_INTERVAL, timeout / _LOOKS) if timeout else _LONGEST_INTERVAL

    async def run(self) -> None:
        """For as long as the manager lives."""
        while True:
            await asyncio.sleep(self._interval)
            watched = [one for one in self._running.values() if one.may_hang and self._timeout]
            for gone in self._since.keys() - {one.id for one in watched}:
                del self._since[gone]
                self._seen.pop(gone, None)
            await asyncio.gather(*(self._look(one) for one in watched))

    async def _look(self, instance: Instance) -> None:
        now = asyncio.get_running_loop().time()
        since = self._since.setdefault(instance.id, now)
        if not self._is_at_work(instance.id):
            self._since[instance.id] = now
            return
        assert instance.info is not None, "it is ready"
        seen = await progress(instance.info.address, self._interval)
        if seen is not None and seen != self._seen.get(instance.id):
            self._seen[instance.id] = seen
            self._since[instance.id] = now
            instance.progress_at = time.time()
        elif now - since >= self._timeout and self._is_at_work(instance.id) and instance.may_hang:
            logger.error("model {}: no progress for {:.0f} s with requests under way", instance.model, now - since)
            instance.kill(f"it made no progress for {self._timeout:g} s (limits.stall_timeout) and was ended")
