"""Tracing of requests and loads: remembers loads, and has spans of finished requests sent. On the manager's one loop.

Spans are made when a request is over, so tracing costs nothing on its way. OpenTelemetry (`spans.py`) is imported when
a collector is configured: it takes 15 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llm_api_server.config.models import TracingConfig
from llm_api_server.ipc.trace_context import TracedRequest
from llm_api_server.manager.instances.load_phases import LoadTrace

if TYPE_CHECKING:
    from llm_api_server.manager.telemetry.spans import SpanSender

#: Loads that are remembered for the requests that waited for them.
MAX_LOADS = 256
#: Seconds that sending the last spans may take when the manager stops.
CLOSE_TIMEOUT = 3.0


class Tracing:
    """Tracing of the manager; off until `configure` gives it a collector."""

    def __init__(self) -> None:
        self._config = TracingConfig()
        self._sender: SpanSender | None = None
        self._loads: deque[LoadTrace] = deque(maxlen=MAX_LOADS)

    def configure(self, config: TracingConfig) -> None:
        """Send to another collector from now on; the former one still gets its spans."""
        if config == self._config:
            return
        self._config = config
        if self._sender is not None:
            threading.Thread(target=self._sender.close, daemon=True).start()
        self._sender = None
        if config.endpoint:
            from llm_api_server.manager.telemetry.spans import SpanSender  # noqa: PLC0415 - see above

            self._sender = SpanSender(config.endpoint, config.headers, config.service_name)

    def loaded(self, load: LoadTrace) -> None:
        """Remember a load, also a failed one. Comes before the requests that waited for it have finished."""
        self._loads.append(load)

    def finished(self, requests: Iterable[TracedRequest]) -> None:
        if self._sender is not None:
            for traced in requests:
                self._sender.send(traced, self._loads)

    async def close(self) -> None:
        """Send what is left, within `CLOSE_TIMEOUT`."""
        if self._sender is None:
            return
        loop, sender, is_closed = asyncio.get_running_loop(), self._sender, asyncio.Event()

        def work() -> None:
            sender.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the timeout is over
                loop.call_soon_threadsafe(is_closed.set)

        threading.Thread(target=work, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_closed.wait(), CLOSE_TIMEOUT)
