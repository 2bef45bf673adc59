"""Schedulers and models for the tests of scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.ipc.model_status import Explanation
from llm_api_server.manager.scheduling.concurrency import FEW_SLOTS
from llm_api_server.manager.scheduling.decisions import Decision, Grant, Start
from llm_api_server.manager.scheduling.explain import explain
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model, Policy
from tests.machine import GIB

NAMES = ("a", "b", "c")


MIN_LOADED, MAX_WAIT = 1.0, 5.0


def make(
    max_loaded: int = 1,
    *,
    unload_timeout: float = 0,
    preload: tuple[str, ...] = (),
    devices: Sequence[Device] = (),
    slots: int | None = 16,
    **policy: float,
) -> Scheduler:
    """Return a scheduler of the models a, b and c, whose instances will be i1, i2 and so on."""
    numbers = count(1)
    models = [Model(name, unload_timeout, name in preload, slots=slots) for name in NAMES]
    options: dict[str, Any] = {
        "min_loaded_time": MIN_LOADED,
        "max_wait_time": MAX_WAIT,
        "sleep_bytes": 16 * GIB,
        **policy,
    }
    return Scheduler(Policy(max_loaded, **options), models, lambda: f"i{next(numbers)}", devices)


def loaded(scheduler: Scheduler, name: str, waiter: int, now: float) -> str:
    """Load `name` for `waiter` and return the instance, with one slot in use."""
    (start,) = scheduler.acquire(waiter, name, now)
    assert isinstance(start, Start)
    assert scheduler.on_ready(start.instance, now) == [Grant(waiter, start.instance)]
    return start.instance


def ready(scheduler: Scheduler, name: str = "a") -> None:
    scheduler.load(0, name, 0)
    scheduler.on_ready("i1", 0)


def grants(decisions: list[Decision]) -> list[int]:
    return [one.waiter for one in decisions if isinstance(one, Grant)]


def whole(weights: float = 10, count: int = 1) -> ModelFacts:
    """Return facts with vLLM's default need: 90 % of each GPU, or what other programs leave."""
    return ModelFacts(need=Need("gpu", int(weights * GIB), count, 0.9, is_share_soft=True, measures_memory=True))


def part(share: float, weights: float = 5, *, sleeps: bool = False) -> ModelFacts:
    asleep = SleepFootprint(GIB, int(weights * GIB)) if sleeps else None
    return ModelFacts(need=Need("gpu", int(weights * GIB), 1, share, measures_memory=True), sleep_footprint=asleep)


def in_ram(size: float) -> ModelFacts:
    return ModelFacts(need=Need("ram", int(size * GIB)))


class World:
    """A scheduler with a clock of its own."""

    def __init__(self, devices: list[Device], models: dict[str, ModelFacts], **policy: float) -> None:
        numbers = count(1)
        options = {"max_loaded": 10, "min_loaded_time": 0, "max_wait_time": 5, **policy}
        entries = [Model(name, unload_timeout=1000) for name in models]
        self.scheduler = Scheduler(Policy(**options), entries, lambda: f"i{next(numbers)}", devices)  # type: ignore[arg-type]
        for name, facts in models.items():
            self.scheduler.update_facts(name, replace(facts, slots=FEW_SLOTS))
        self.now = 0.0
        self.waiters = count(1)

    def ask(self, model: str) -> list[Decision]:
        self.now += 1
        return self.scheduler.acquire(next(self.waiters), model, self.now)

    def load(self, model: str) -> Placement:
        """Load the model for one request, end the request, and return the placement."""
        (start,) = self.ask(model)
        assert isinstance(start, Start)
        self.ready(model)
        self.release(model)
        return start.placement

    def ready(self, model: str) -> list[Decision]:
        return self.scheduler.on_ready(self.instance(model), self.now)

    def release(self, model: str) -> list[Decision]:
        self.now += 1
        return self.scheduler.return_slots(self.instance(model), 1, self.now)

    def stopped(self, model: str) -> list[Decision]:
        return self.scheduler.on_stopped(self.instance(model), self.now)

    def slept(self, model: str) -> list[Decision]:
        return self.scheduler.on_slept(self.instance(model), self.now)

    def tick(self) -> list[Decision]:
        """Advance the clock to the next tick."""
        at = self.scheduler.next_tick(self.now)
        assert at is not None
        self.now = at
        return self.scheduler.tick(at)

    def instance(self, model: str) -> str:
        allocation = self.scheduler.models[model].allocation
        assert allocation is not None
        return allocation.id

    def explain(self, model: str) -> Explanation:
        return explain(self.scheduler, model)


def devices_of(placement: Placement) -> list[str]:
    return [device.device for device in placement.devices]
