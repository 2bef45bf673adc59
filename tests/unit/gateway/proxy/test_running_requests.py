"""Ticks and shutdown of the requests in progress."""

from __future__ import annotations

import asyncio
import time

import pytest

from llm_api_server.gateway.proxy.running_requests import RunningRequests

pytestmark = pytest.mark.anyio


class FakeRequest:
    def __init__(self, running: RunningRequests) -> None:
        self.ticks: asyncio.Queue[float] = asyncio.Queue()
        self.is_shut_down = False
        self._running = running
        running.add(self)

    def on_tick(self, now: float) -> None:
        self.ticks.put_nowait(now)

    def on_shutdown(self) -> None:
        self.is_shut_down = True
        self._running.discard(self)


async def test_every_running_request_gets_ticks_of_the_monotonic_clock() -> None:
    running = RunningRequests(tick_interval=0.001)
    requests = [FakeRequest(running), FakeRequest(running)]
    before = time.monotonic()
    running.start()
    for request in requests:
        first, second = await request.ticks.get(), await request.ticks.get()
        assert before <= first < second <= time.monotonic()
    running.close()


async def test_a_request_that_has_ended_gets_no_tick() -> None:
    running = RunningRequests(tick_interval=0.001)
    ended, other = FakeRequest(running), FakeRequest(running)
    running.discard(ended)
    running.start()
    await other.ticks.get()
    running.close()
    assert ended.ticks.empty()


async def test_closing_ends_all_requests_and_stops_the_ticks() -> None:
    running = RunningRequests(tick_interval=0.001)
    requests = [FakeRequest(running), FakeRequest(running)]
    running.start()
    running.close()
    assert all(request.is_shut_down for request in requests)
    assert running._timer is not None
    assert running._timer.cancelled()
