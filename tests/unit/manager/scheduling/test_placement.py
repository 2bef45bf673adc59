"""Placement of models on hosts of many kinds, with the evictions that it needs."""

from __future__ import annotations

import pytest

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import DeviceAllocation, ModelFacts, Need, Placement
from llm_api_server.manager.scheduling.decisions import Grant, Refuse, Start, Stop
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram
from tests.unit.manager.scheduling.cases import (
    World,
    devices_of,
    in_ram,
    part,
    whole,
)


def test_a_full_gpu_evicts_the_least_recently_used_model() -> None:
    world = World(gpus(24), {"a": part(0.4), "b": part(0.4), "c": part(0.4)})
    assert devices_of(world.load("a")) == ["gpu0"]
    assert world.load("b").is_shared
    assert world.ask("c") == [Stop("i1")]
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.placement == Placement((DeviceAllocation("gpu0", int(0.4 * 24 * GIB), 24 * GIB, 0),), is_shared=True)


def test_a_model_goes_to_the_gpu_that_it_fills_best() -> None:
    world = World(gpus(80, 24, 48), {"small": ModelFacts(need=Need("gpu", 20 * GIB)), "large": whole(40)})
    assert devices_of(world.load("small")) == ["gpu1"]
    assert devices_of(world.load("large")) == ["gpu2"]


def test_eight_gpus_hold_models_side_by_side_and_evict_the_fewest() -> None:
    singles = {f"single{n}": whole() for n in range(4)}
    world = World(gpus(*[80] * 8), {**singles, "quad": whole(40, 4), "pair": whole(40, 2)})
    quad = world.load("quad")
    taken = [*devices_of(quad), *(devices_of(world.load(name))[0] for name in singles)]
    assert sorted(taken) == [f"gpu{n}" for n in range(8)]
    assert world.ask("pair") == [Stop(world.instance("quad"))], "one model goes rather than two"


def test_tensor_parallel_prefers_devices_of_one_size() -> None:
    world = World(gpus(24, 80, 24, 80), {"pair": whole(15, 2), "triple": whole(15, 3)})
    assert devices_of(world.load("pair")) == ["gpu0", "gpu2"]
    world.scheduler.unload(99, "pair", world.now)
    world.stopped("pair")
    assert len(devices_of(world.load("triple"))) == 3


def test_the_share_of_a_mixed_group_is_the_smallest() -> None:
    placement = Placement(
        (DeviceAllocation("gpu0", 6 * GIB, 24 * GIB, 0), DeviceAllocation("gpu1", 40 * GIB, 80 * GIB, 1))
    )
    assert placement.share == 0.25


def test_a_soft_share_shrinks_to_the_free_memory_and_a_hard_one_does_not() -> None:
    world = World(gpus(24), {"soft": whole(8), "hard": part(0.9)})
    world.scheduler.update_foreign({"gpu0": 10 * GIB})
    (device,) = world.load("soft").devices
    assert 13 * GIB < device.size < 14 * GIB
    (refusal,) = world.ask("hard")
    assert isinstance(refusal, Refuse)
    assert "other programs hold 10.0 GiB of gpu0" in refusal.message
    assert refusal.retry_after == 10
    world.scheduler.update_foreign({})
    world.now += 10
    assert world.ask("hard") == [Stop("i1")]


def test_a_model_uses_only_its_configured_gpus() -> None:
    facts = ModelFacts(need=Need("gpu", 5 * GIB, 1, 0.9, gpus=(1,)))
    world = World(gpus(24, 24), {"a": facts, "b": facts, "lost": ModelFacts(need=Need("gpu", GIB, gpus=(7,)))})
    assert devices_of(world.load("a")) == ["gpu1"]
    assert world.ask("b") == [Stop("i1")]
    (refusal,) = world.ask("lost")
    assert isinstance(refusal, Refuse)


@pytest.mark.parametrize(
    ("devices", "facts", "message"),
    [
        (gpus(24), whole(40), "a GPU with up to 90% free, at least 40.0 GiB, but there is 24.0 GiB"),
        (gpus(24, 80), whole(30, 2), "2 GPUs, each with up to 90% free, at least 30.0 GiB, but there are 24.0 GiB, 80"),
        (gpus(24), part(0.3, 8), "a GPU with 30% free, at least 8.0 GiB, but there is 24.0 GiB"),
        ([ram(16)], whole(8), "but there is no GPU"),
        ([ram(16)], in_ram(20), "it needs 20.0 GiB of RAM, but there is 16.0 GiB of RAM for models"),
    ],
)
def test_a_model_that_can_never_fit_is_refused_at_once_with_the_arithmetic(
    devices: list[Device], facts: ModelFacts, message: str
) -> None:
    world = World(devices, {"a": facts})
    (refusal,) = world.ask("a")
    assert isinstance(refusal, Refuse)
    assert message in refusal.message
    assert world.scheduler.models["a"].state is ModelState.FAILED
    assert world.scheduler.next_tick(world.now) is None
    assert world.explain("a").verdict == "never"
    assert message in world.explain("a").message


def test_a_start_that_measures_memory_is_alone_on_its_devices() -> None:
    world = World(gpus(80, 80), {"a": part(0.3), "b": part(0.3), "c": whole(60)})
    (first,) = world.ask("a")
    assert isinstance(first, Start)
    assert world.ask("b") == []
    assert world.scheduler.models["b"].allocation is None
    (elsewhere,) = world.ask("c")
    assert isinstance(elsewhere, Start)
    assert devices_of(elsewhere.placement) != devices_of(first.placement)
    grant, second = world.ready("a")
    assert isinstance(grant, Grant)
    assert isinstance(second, Start)
    assert devices_of(second.placement) == devices_of(first.placement)


def test_starts_that_measure_nothing_run_at_the_same_time() -> None:
    world = World([ram(32)], {"a": in_ram(5), "b": in_ram(5)})
    assert [type(decision) for name in "ab" for decision in world.ask(name)] == [Start, Start]


def test_ram_is_shared_by_size_not_by_count() -> None:
    world = World([ram(16)], {"a": in_ram(6), "b": in_ram(6), "c": in_ram(3), "d": in_ram(7)})
    for name in "abc":
        world.load(name)
    world.ask("a")
    assert world.ask("d") == [Stop(world.instance("b"))], "c alone would not be enough, and a is in use"
    (start,) = world.stopped("b")
    assert isinstance(start, Start)
    assert start.model == "d"


def test_max_loaded_counts_as_well_as_memory() -> None:
    world = World([ram(64)], {"a": in_ram(1), "b": in_ram(1)}, max_loaded=1)
    world.load("a")
    assert world.ask("b") == [Stop("i1")]


def test_memory_that_is_about_to_be_free_is_reserved_once() -> None:
    world = World(gpus(24), {"a": whole(), "b": whole(), "c": whole()})
    world.load("a")
    assert world.ask("b") == [Stop("i1")]
    assert world.ask("c") == []
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.model == "b"


def test_evicted_memory_goes_to_the_model_it_was_evicted_for() -> None:
    world = World(gpus(24), {"a": part(0.5), "large": whole(), "small": part(0.4)})
    world.load("a")
    assert world.ask("large") == [Stop("i1")]
    assert world.ask("small") == []
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.model == "large"
