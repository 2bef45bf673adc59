"""Registry of the requests in progress. One timer serves the deadlines and pings of all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from loguru import logger

#: Seconds until a stream without a byte gets its head and a comment, so that proxies and clients do not time out ...
FIRST_PING_DELAY = 2.0
#: ... and between further comments until its first byte.
PING_INTERVAL = 10.0
#: Seconds between two checks of deadlines and pings.
TICK_INTERVAL = 0.1


class RunningRequest(Protocol):
    def on_tick(self, now: float) -> None:
        """Check deadline and ping; `now` is in seconds of `time.monotonic`."""

    def on_shutdown(self) -> None:
        """End now: the worker stops."""


class RunningRequests:
    """All requests in progress of one worker."""

    def __init__(
        self,
        *,
        first_ping_delay: float = FIRST_PING_DELAY,
        ping_interval: float = PING_INTERVAL,
        tick_interval: float = TICK_INTERVAL,
    ) -> None:
        self.first_ping_delay = first_ping_delay
        self.ping_interval = ping_interval
        self._tick_interval = tick_interval
        self._requests: set[RunningRequest] = set()
        self._timer: asyncio.TimerHandle | None = None
        # The set's own methods: a wrapper would cost each request two calls.
        self.add: Callable[[RunningRequest], None] = self._requests.add
        self.discard: Callable[[RunningRequest], None] = self._requests.discard

    def start(self) -> None:
        self._tick()

    def close(self) -> None:
        """End all requests that are still running."""
        if self._timer is not None:
            self._timer.cancel()
        for request in list(self._requests):
            try:
                request.on_shutdown()
            except Exception:  # noqa: BLE001 - the others must end as well
                logger.exception("a request could not be ended")

    def _tick(self) -> None:
        now = time.monotonic()
        for request in list(self._requests):
            try:
                request.on_tick(now)
            except Exception:  # noqa: BLE001 - the timer serves the others as well
                logger.exception("a request's deadline could not be checked")
        self._timer = asyncio.get_running_loop().call_later(self._tick_interval, self._tick)
