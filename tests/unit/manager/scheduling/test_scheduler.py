"""Decisions of the scheduler in single cases: loads, evictions, unloads, adoption and shutdown."""

from __future__ import annotations

from llm_api_server.manager.scheduling.decisions import Done, Grant, Refuse, Revoke, Start, Stop
from llm_api_server.types import ModelState
from tests.unit.manager.scheduling.cases import (
    loaded,
    make,
)


def test_many_waiters_cause_one_load() -> None:
    scheduler = make()
    decisions = [scheduler.acquire(waiter, "a", 0) for waiter in range(16)]
    assert decisions == [[Start("i1", "a")], *[[] for _ in range(15)]]
    assert scheduler.on_ready("i1", 1) == [Grant(waiter, "i1") for waiter in range(16)]


def test_a_request_for_a_ready_model_is_granted_at_once() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.acquire(2, "a", 0) == [Grant(2, instance)]


def test_an_idle_model_is_evicted_after_its_minimum_time() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 0.1)
    assert scheduler.acquire(2, "b", 0.2) == []
    assert scheduler.next_tick(0.2) == 1
    assert scheduler.tick(1) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 1.5) == [Start("i2", "b")]


def test_a_busy_model_drains_after_the_maximum_wait() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.acquire(2, "b", 2) == []
    assert scheduler.next_tick(2) == 7
    assert scheduler.tick(6.9) == []
    assert scheduler.tick(7) == [Revoke(instance)]
    assert scheduler.acquire(3, "a", 8) == []
    assert scheduler.return_slots(instance, 1, 60) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 61) == [Start("i2", "b")]
    assert set(scheduler.models["a"].queue) == {3}


def test_an_eviction_is_called_off_when_its_waiter_leaves() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.acquire(2, "b", 2)
    scheduler.tick(7)
    scheduler.acquire(3, "a", 8)
    assert scheduler.cancel(2, "b", 9) == [Grant(3, instance)]
    assert scheduler.models["a"].state is ModelState.READY


def test_the_least_recently_used_model_is_evicted_first_and_a_preloaded_one_last() -> None:
    scheduler = make(max_loaded=2, preload=("a",))
    assert scheduler.preload(0) == [Start("i1", "a")]
    scheduler.on_ready("i1", 0)
    second = loaded(scheduler, "b", 1, 5)
    scheduler.return_slots(second, 1, 6)
    assert scheduler.acquire(2, "c", 10) == [Stop(second)]


def test_a_preload_does_not_evict_another_model() -> None:
    scheduler = make(preload=("b",))
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 1)
    assert scheduler.preload(10) == []
    assert scheduler.acquire(2, "b", 11) == [Stop(instance)]


def test_a_load_goes_on_when_its_client_leaves() -> None:
    scheduler = make()
    scheduler.acquire(1, "a", 0)
    assert scheduler.cancel(1, "a", 1) == []
    assert scheduler.on_ready("i1", 2) == []
    assert scheduler.models["a"].state is ModelState.READY


def test_an_unload_waits_for_the_requests_in_flight() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.unload(2, "a", 1) == [Revoke(instance)]
    assert scheduler.return_slots(instance, 1, 5) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 6) == [Done(2)]
    assert scheduler.unload(3, "a", 7) == [Done(3)]


def test_a_request_during_an_unload_gets_a_new_instance() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.unload(2, "a", 1)
    assert scheduler.acquire(3, "a", 2) == []
    scheduler.return_slots(instance, 1, 3)
    assert scheduler.on_stopped(instance, 4) == [Done(2), Start("i2", "a")]
    assert scheduler.on_ready("i2", 5) == [Grant(3, "i2")]


def test_an_idle_model_is_unloaded_after_its_timeout() -> None:
    scheduler = make(unload_timeout=10)
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.next_tick(5) is None
    scheduler.return_slots(instance, 1, 20)
    assert scheduler.next_tick(20) == 30
    assert scheduler.tick(29) == []
    assert scheduler.tick(30) == [Stop(instance)]


def test_an_adopted_instance_is_not_evicted_before_the_workers_report() -> None:
    scheduler = make()
    scheduler.adopt("old", "a", 0)
    assert scheduler.acquire(1, "b", 1) == []
    scheduler.restore_slots("old", 1)
    assert scheduler.tick(5) == []
    assert scheduler.return_slots("old", 1, 5.5) == [Stop("old")]


def test_adopted_instances_beyond_the_limit_are_stopped() -> None:
    scheduler = make(max_loaded=1)
    scheduler.adopt("old-a", "a", 0)
    scheduler.adopt("old-b", "b", 0)
    assert scheduler.next_tick(0) == 5
    assert scheduler.tick(5) == [Stop("old-a")]


def test_a_remote_model_does_not_count_against_max_loaded() -> None:
    scheduler = make(max_loaded=1)
    scheduler.models["b"].is_local = False
    instance = loaded(scheduler, "a", 1, 0)
    remote = loaded(scheduler, "b", 2, 0)
    scheduler.return_slots(remote, 1, 1)
    scheduler.return_slots(instance, 1, 9)
    assert scheduler.acquire(3, "c", 10) == [Stop(instance)]


def test_a_shutdown_refuses_the_waiters_and_stops_all_instances() -> None:
    scheduler = make(max_loaded=2)
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.acquire(2, "b", 1)
    decisions = scheduler.shut_down()
    assert [type(decision) for decision in decisions] == [Refuse, Stop, Stop]
    assert Stop(instance) in decisions
    assert isinstance(scheduler.acquire(3, "a", 2)[0], Refuse)
