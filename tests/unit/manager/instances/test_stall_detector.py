"""Stalled engines: no progress while requests are in flight. The clock and the counters are the test's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from llm_api_server.manager.instances.running_instances import RunningInstances
from llm_api_server.manager.instances.stall_detector import StallDetector

pytestmark = pytest.mark.anyio

TIMEOUT = 20.0


class Watched:
    """A detector over one instance, whose counters stand still unless changed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.counters: tuple[bytes, ...] | None = (b"steps 1",)
        self.is_working = True
        self.kills: list[str] = []
        info = SimpleNamespace(address="unix:/i1.sock")
        self.instance = SimpleNamespace(
            id="i1", model="a", may_stall=True, info=info, progress_at=None, kill=self.kills.append
        )
        instances = RunningInstances()
        instances.add(cast("Any", self.instance))
        self.detector = StallDetector(
            TIMEOUT, instances, lambda _: self.is_working, probe=self.probe, clock=lambda: self.now
        )

    async def probe(self, address: str, _timeout: float) -> tuple[bytes, ...] | None:
        assert address == "unix:/i1.sock"
        return self.counters

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        await self.detector.probe_all()


async def test_an_instance_without_progress_is_killed_after_the_timeout() -> None:
    watched = Watched()
    await watched.pass_time(0)
    await watched.pass_time(TIMEOUT - 1)
    assert watched.kills == []
    await watched.pass_time(1)
    assert watched.kills == ["it made no progress for 20 s (limits.stall_timeout) and was ended"]


async def test_an_engine_that_does_not_respond_makes_no_progress() -> None:
    watched = Watched()
    watched.counters = None
    await watched.pass_time(0)
    await watched.pass_time(TIMEOUT)
    assert len(watched.kills) == 1
    assert watched.instance.progress_at is None


async def test_changed_counters_are_progress() -> None:
    watched = Watched()
    for step in range(5):
        watched.counters = (b"steps %d" % step,)
        await watched.pass_time(TIMEOUT - 1)
    assert watched.kills == []
    assert watched.instance.progress_at is not None


async def test_an_idle_instance_is_not_killed_and_starts_anew() -> None:
    watched = Watched()
    await watched.pass_time(0)
    watched.is_working = False
    await watched.pass_time(10 * TIMEOUT)
    watched.is_working = True
    await watched.pass_time(TIMEOUT - 1)
    assert watched.kills == []


@pytest.mark.parametrize("option", ["timeout", "may_stall"])
async def test_without_a_timeout_or_a_process_nothing_is_killed(option: str) -> None:
    watched = Watched()
    if option == "timeout":
        watched.detector.configure(0)
    else:
        watched.instance.may_stall = False
    await watched.pass_time(0)
    await watched.pass_time(10 * TIMEOUT)
    assert watched.kills == []
