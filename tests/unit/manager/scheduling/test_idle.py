"""Sleep of idle models: levels, waking, and failures."""

from __future__ import annotations

from dataclasses import replace

from llm_api_server.engines.base import DeviceAllocation, ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.manager.scheduling.concurrency import FEW_SLOTS
from llm_api_server.manager.scheduling.decisions import Grant, Refuse, Revoke, Sleep, Start, Stop, Wake
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram
from tests.unit.manager.scheduling.cases import (
    World,
    part,
)


def sleepers(**policy: float) -> World:
    facts = part(0.9, 10, sleeps=True)
    policy = {"sleep_timeout": 10, "deep_sleep_timeout": 60, "sleep_bytes": 16 * GIB, **policy}
    return World([*gpus(24), ram(64)], {"a": facts, "b": facts, "c": facts}, **policy)


def test_an_idle_model_sleeps_then_sleeps_deeper_then_unloads() -> None:
    world = sleepers()
    world.load("a")
    assert world.tick() == [Sleep("i1", 1)]
    world.slept("a")
    assert world.scheduler.allocations["i1"].memory == {"gpu0": GIB, "ram": 10 * GIB}
    assert world.tick() == [Sleep("i1", 2, from_level=1)]
    assert world.scheduler.allocations["i1"].memory["gpu0"] > 20 * GIB, "it wakes in between"
    world.slept("a")
    assert world.scheduler.allocations["i1"].memory == {"gpu0": GIB}
    assert world.tick() == [Stop("i1")]


def test_a_request_wakes_a_sleeping_model() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    assert world.ask("a") == [], "not before it has fallen asleep"
    assert world.slept("a") == [Wake("i1", 1)]
    assert world.scheduler.models["a"].state is ModelState.STARTING
    (grant,) = world.ready("a")
    assert isinstance(grant, Grant)
    assert world.scheduler.allocations["i1"].memory == {"gpu0": int(0.9 * 24 * GIB)}


def test_two_models_swap_by_sleeping() -> None:
    models = {name: part(0.9, 10, sleeps=True) for name in "ab"}
    world = World([*gpus(48), ram(64)], models, sleep_bytes=16 * GIB, max_loaded=1)
    world.load("a")
    assert world.ask("b") == [Sleep("i1", 1)]
    (start,) = world.slept("a")
    assert isinstance(start, Start)
    world.ready("b")
    world.release("b")
    assert world.ask("a") == [Sleep("i2", 2)], "the budget has RAM for the weights of one"
    assert world.slept("b") == [Wake("i1", 1)]


def test_a_model_is_stopped_if_its_sleep_would_free_too_little() -> None:
    facts = ModelFacts(
        need=Need("gpu", GIB, share=0.9, measures_memory=True), sleep_footprint=SleepFootprint(4 * GIB, GIB)
    )
    world = World([*gpus(24), ram(64)], {"a": facts, "b": facts})
    world.load("a")
    assert world.ask("b") == [Stop("i1")]


def test_waking_evicts_the_models_on_its_device() -> None:
    world = World(
        [*gpus(48), ram(64)], {"a": part(0.5, 10, sleeps=True), "b": part(0.9, 10)}, sleep_timeout=5, sleep_bytes=0
    )
    world.load("a")
    assert world.tick() == [Sleep("i1", 2)]
    world.slept("a")
    world.load("b")
    assert world.ask("a") == [Stop("i2")]
    assert world.stopped("b") == [Wake("i1", 2)]


def test_a_sleeping_model_without_memory_to_sleep_deeper_is_stopped() -> None:
    world = World([*gpus(48), ram(64)], {"a": part(0.5, 10, sleeps=True), "b": part(0.9)}, sleep_bytes=16 * GIB)
    world.load("a")
    assert world.ask("b") == [Sleep("i1", 1)]
    world.slept("a")
    world.ready("b")
    world.scheduler.policy = replace(world.scheduler.policy, deep_sleep_timeout=10)
    assert world.tick() == [Stop("i1")]


def test_a_sleeping_model_whose_device_other_programs_filled_is_stopped_and_its_requests_refused() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    world.slept("a")
    world.scheduler.update_foreign({"gpu0": 20 * GIB})
    stop, refusal = world.ask("a")
    assert stop == Stop("i1")
    assert isinstance(refusal, Refuse)
    assert "other programs hold 20.0 GiB of gpu0" in refusal.message


def test_a_busy_model_drains_before_it_sleeps() -> None:
    world = World([*gpus(48), ram(64)], {n: part(0.9, 10, sleeps=True) for n in "ab"}, sleep_bytes=16 * GIB)
    world.load("a")
    world.ask("a")
    assert world.ask("b") == []
    assert world.tick() == [Revoke("i1")]
    assert world.release("a") == [Sleep("i1", 1)]


def test_a_model_that_fails_to_sleep_is_stopped_and_sleeps_no_more() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    assert world.scheduler.on_sleep_failed("i1", world.now) == [Stop("i1")]
    world.ask("a")
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    world.ready("a")
    world.release("a")
    assert world.tick() == [Stop("i2")]


def test_a_model_that_fails_to_wake_is_reloaded_for_its_requests() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    world.slept("a")
    assert world.ask("a") == [Wake("i1", 1)]
    assert world.scheduler.on_sleep_failed("i1", world.now) == [Stop("i1")]
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    (grant,) = world.ready("a")
    assert isinstance(grant, Grant)


def test_an_idle_model_that_cannot_sleep_is_unloaded() -> None:
    world = sleepers()
    world.scheduler.update_facts("a", replace(part(0.9, 10), slots=FEW_SLOTS))
    world.load("a")
    assert world.tick() == [Stop("i1")]
    assert world.now == 1000 + 2


def test_an_adopted_instance_keeps_its_memory_and_can_sleep() -> None:
    world = World([*gpus(24), ram(64)], {"a": part(0.9, 10)}, sleep_timeout=10, sleep_bytes=16 * GIB)
    placement = Placement((DeviceAllocation("gpu0", 20 * GIB, 24 * GIB, 0),))
    world.scheduler.adopt("old", "a", 0, placement)
    world.scheduler.update_facts("a", part(0.9, 10, sleeps=True))
    assert world.scheduler.allocations["old"].memory == {"gpu0": 20 * GIB}
    assert world.tick() == [Sleep("old", 1)]


def test_an_unload_command_stops_a_sleeping_model() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    world.slept("a")
    assert world.scheduler.unload(50, "a", world.now) == [Stop("i1")]


def test_preloaded_models_do_not_sleep_from_idleness() -> None:
    world = sleepers()
    world.scheduler.models["a"].preload = True
    world.scheduler.models["a"].unload_timeout = 0
    world.load("a")
    assert world.scheduler.next_tick(world.now) is None
