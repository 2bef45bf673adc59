"""Memory that other programs hold: measured, compared with the allocations, and waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from llm_api_server.engines.base import ModelFacts, Need
from llm_api_server.manager.instances.device_watch import DeviceWatch
from llm_api_server.manager.scheduling.decisions import Start
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model, Policy
from tests.machine import GIB, Machine, gpus, ram

pytestmark = pytest.mark.anyio

FACTS = {"gpu": ModelFacts(need=Need("gpu", 10 * GIB)), "ram": ModelFacts(need=Need("ram", 4 * GIB))}


class Watched:
    """A watch over a GPU of 24 GiB and 64 GiB of RAM, with a loaded model of each kind: `gpu` and `ram`."""

    def __init__(self, machine: Machine | None = None, release_timeout: float = 0) -> None:
        self.machine = machine or Machine(*gpus(24), ram(64))
        policy = Policy(max_loaded=2, min_loaded_time=0, max_wait_time=5)
        ids = iter(["gpu-1", "ram-1"])
        self.scheduler = Scheduler(policy, [Model(name, 0) for name in FACTS], lambda: next(ids), self.machine.devices)
        for name, facts in FACTS.items():
            self.scheduler.update_facts(name, facts)
            (start,) = self.scheduler.load(1, name, 0)
            assert isinstance(start, Start)
            self.scheduler.on_ready(start.instance, 0)
        self.rss: int | None = None
        self.watch = DeviceWatch(self.machine, self.scheduler, lambda _: self.rss, release_timeout=release_timeout)

    async def foreign(self) -> Mapping[str, int]:
        await self.watch.observe()
        return self.scheduler.foreign


async def test_memory_beyond_the_allocations_is_foreign() -> None:
    watched = Watched()
    watched.machine.in_use = {"gpu0": 13, "ram": 9}
    assert await watched.foreign() == {"gpu0": 3 * GIB, "ram": 5 * GIB}


async def test_an_instance_that_has_not_grown_into_its_ram_leaves_no_room_for_others() -> None:
    watched = Watched()
    watched.machine.in_use = {"gpu0": 10, "ram": 6}
    watched.rss = 1 * GIB
    assert await watched.foreign() == {"gpu0": 0, "ram": 5 * GIB}


async def test_a_driver_that_fails_keeps_the_last_measurement() -> None:
    watched = Watched()
    watched.machine.in_use = {"gpu0": 13, "ram": 4}
    before = await watched.foreign()
    watched.machine.devices = []
    watched.machine.used = _broken  # type: ignore[method-assign]
    assert await watched.foreign() == before


def _broken() -> Mapping[str, int]:
    raise OSError("the driver is gone")


class ChangingMachine(Machine):
    """Calls `on_read` during the first measurement."""

    on_read: Callable[[], None] | None = None
    reads = 0

    def used(self) -> Mapping[str, int]:
        self.reads += 1
        if self.on_read is not None:
            on_read, self.on_read = self.on_read, None
            on_read()
        return super().used()


async def test_a_measurement_is_repeated_if_an_allocation_changes_meanwhile() -> None:
    machine = ChangingMachine(*gpus(24), ram(64))
    watched = Watched(machine)
    machine.in_use = {"gpu0": 10, "ram": 4}
    machine.on_read = lambda: _unload(watched.scheduler, machine)
    assert await watched.foreign() == {"gpu0": 0, "ram": 0}
    assert machine.reads == 2


def _unload(scheduler: Scheduler, machine: Machine) -> None:
    scheduler.unload(2, "gpu", 1)
    scheduler.on_stopped("gpu-1", 1)
    machine.in_use["gpu0"] = 0


async def test_memory_that_is_freed_late_is_waited_for() -> None:
    machine = ChangingMachine(*gpus(24), ram(64))
    watched = Watched(machine, release_timeout=60)
    machine.in_use = {"gpu0": 10, "ram": 4}
    watched.scheduler.unload(2, "gpu", 1)

    def free_at_the_second_read() -> None:
        machine.on_read = lambda: machine.in_use.update(gpu0=0)

    machine.on_read = free_at_the_second_read
    assert await watched.watch.wait_freed("gpu-1")
    assert machine.reads == 2
    assert watched.scheduler.foreign["gpu0"] == 0


async def test_memory_that_is_not_freed_in_time_becomes_foreign() -> None:
    watched = Watched()
    watched.machine.in_use = {"gpu0": 10, "ram": 4}
    watched.scheduler.unload(2, "gpu", 1)
    assert not await watched.watch.wait_freed("gpu-1")
    assert watched.scheduler.foreign["gpu0"] == 10 * GIB


async def test_instances_without_device_memory_are_not_waited_for() -> None:
    watched = Watched()
    assert await watched.watch.wait_freed("unknown")
