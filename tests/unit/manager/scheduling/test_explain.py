"""Explanations of whether a model fits."""

from __future__ import annotations

from tests.machine import GIB, gpus, ram
from tests.unit.manager.scheduling.cases import (
    World,
    part,
    whole,
)


def test_an_explanation_predicts_what_a_request_would_cause() -> None:
    world = World([*gpus(24, 24), ram(64)], {"a": whole(), "b": whole(), "c": whole(), "d": part(0.2, 2)})
    assert world.explain("a").verdict == "fits"
    assert world.explain("a").takes == {"gpu0": int(0.9 * 24 * GIB)}
    world.load("a")
    world.load("b")
    assert world.explain("a").verdict == "loaded"
    assert (world.explain("c").verdict, world.explain("c").evict) == ("after_evicting", ["a"])
    world.ask("a")
    assert world.explain("c").evict == ["b"]
    world.ask("b")
    busy = world.explain("c")
    assert (busy.verdict, busy.evict) == ("after_evicting", ["a"])
    assert "have requests in flight" in busy.message
    assert world.scheduler.models["c"].allocation is None, "nothing was changed"


def test_an_explanation_has_the_arithmetic_of_each_device() -> None:
    world = World([*gpus(24), ram(64)], {"a": part(0.5), "b": part(0.9)})
    world.load("a")
    world.scheduler.update_foreign({"gpu0": 2 * GIB, "ram": 8 * GIB})
    explanation = world.explain("b")
    assert explanation.verdict == "after_evicting"
    gpu, memory = explanation.devices
    assert (gpu.total, gpu.foreign, gpu.taken, gpu.free) == (24 * GIB, 2 * GIB, {"a": 12 * GIB}, 10 * GIB)
    assert (memory.foreign, memory.free) == (8 * GIB, 56 * GIB)
    world.scheduler.update_foreign({"gpu0": 20 * GIB})
    assert world.explain("b").verdict == "not_now"


def test_a_model_fits_after_waiting_for_one_that_leaves() -> None:
    world = World(gpus(24), {"a": whole(), "b": whole()})
    world.load("a")
    world.ask("b")
    assert world.explain("b").verdict == "after_waiting"
