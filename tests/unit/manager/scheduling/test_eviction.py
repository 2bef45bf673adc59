"""Pinned models: they are not evicted, and models that would need their memory are refused."""

from __future__ import annotations

from llm_api_server.engines.base import ModelFacts, Need
from llm_api_server.manager.scheduling.decisions import Grant, Refuse, Revoke, Start, Stop
from llm_api_server.manager.scheduling.explain import explain
from llm_api_server.types import ModelState
from tests.machine import GIB, ram
from tests.unit.manager.scheduling.cases import (
    loaded,
    make,
)


def test_a_pinned_model_is_not_unloaded_when_idle() -> None:
    scheduler = make(unload_timeout=30)
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.pin("a", 1) == []
    assert scheduler.return_slots(instance, 1, 2) == []
    assert scheduler.next_tick(2) is None
    assert scheduler.tick(1000) == []
    assert scheduler.unpin("a", 1000) == []
    assert scheduler.tick(1000) == [Stop(instance)]


def test_other_models_are_refused_while_pinned_ones_use_up_max_loaded() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 1)
    scheduler.pin("a", 2)
    (refusal,) = scheduler.acquire(2, "b", 10)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "model_load_failed"
    assert "pinned models (a) use up models.max_loaded (1): unpin or unload it" in refusal.message
    explanation = explain(scheduler, "b")
    assert (explanation.verdict, explanation.evict) == ("not_now", [])
    assert "pinned models (a)" in explanation.message


def test_a_refused_model_loads_after_unpinning() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 1)
    scheduler.pin("a", 2)
    scheduler.acquire(2, "b", 10)
    blocked = scheduler.models["b"]
    states = [blocked.state]
    scheduler.unpin("a", 11)
    assert [*states, blocked.state] == [ModelState.FAILED, ModelState.STOPPED]
    assert scheduler.acquire(3, "b", 12) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 13) == [Start("i2", "b")]


def test_a_refusal_names_the_pinned_models_that_hold_memory() -> None:
    scheduler = make(2, devices=[ram(16)])
    for name in ("a", "b"):
        scheduler.update_facts(name, ModelFacts(need=Need("ram", 10 * GIB), slots=16))
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 1)
    scheduler.pin("a", 2)
    (refusal,) = scheduler.acquire(2, "b", 10)
    assert isinstance(refusal, Refuse)
    assert "it needs 10.0 GiB of RAM, and pinned models (a) hold memory that it would need" in refusal.message


def test_an_unpinned_model_is_evicted_instead_of_a_pinned_one() -> None:
    scheduler = make(2)
    first, second = loaded(scheduler, "a", 1, 0), loaded(scheduler, "b", 2, 1)
    scheduler.return_slots(first, 1, 2)
    scheduler.return_slots(second, 1, 3)
    scheduler.pin("a", 4)
    assert scheduler.acquire(3, "c", 10) == [Stop(second)]


def test_pinning_calls_off_an_eviction() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.acquire(2, "b", 2)
    assert scheduler.tick(7) == [Revoke(instance)]
    scheduler.acquire(3, "a", 8)
    refusal, grant = scheduler.pin("a", 9)
    assert isinstance(refusal, Refuse)
    assert grant == Grant(3, instance)
    assert scheduler.models["a"].state is ModelState.READY


def test_unloading_unpins() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 1)
    scheduler.pin("a", 2)
    assert scheduler.unload(2, "a", 3) == [Stop(instance)]
    assert not scheduler.models["a"].is_pinned


def test_a_pin_outlives_a_crash() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.pin("a", 2)
    scheduler.on_exited(instance, "killed", 3)
    again = loaded(scheduler, "a", 2, 4)
    scheduler.return_slots(again, 1, 5)
    (refusal,) = scheduler.acquire(3, "b", 100)
    assert isinstance(refusal, Refuse)


def test_an_adopted_instance_is_pinned_as_before() -> None:
    scheduler = make()
    scheduler.adopt("old", "a", 0, is_pinned=True)
    (refusal,) = scheduler.acquire(1, "b", 10)
    assert isinstance(refusal, Refuse)
