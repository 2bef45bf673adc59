"""Refusals: full queues, loads that are not waited for, failed loads and their back-off."""

from __future__ import annotations

from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.decisions import Done, Refuse, Start
from tests.unit.manager.scheduling.cases import grants, loaded, make, ready


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    scheduler = make(slots=1, queue_per_model=3)
    ready(scheduler)
    for waiter in (1, 2, 3, 4):
        scheduler.acquire(waiter, "a", 0, Claim(f"k{waiter}"))
    for now in (4, 8):
        scheduler.return_slots("i1", 1, now, [EndedRequest(f"k{now // 4}")])
    for waiter in (5, 6):
        scheduler.acquire(waiter, "a", 8, Claim(f"k{waiter}"))
    (refusal,) = scheduler.acquire(7, "a", 8, Claim("k7"))
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.retry_after, refusal.position) == ("server_overloaded", 12, 4)


def test_one_key_cannot_fill_the_queues() -> None:
    scheduler = make(slots=1, queue_per_key=2)
    ready(scheduler)
    for waiter, model in enumerate("aab", 1):
        scheduler.acquire(waiter, model, 0, Claim("x"))
    (refusal,) = scheduler.acquire(4, "a", 0, Claim("x"))
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.position) == ("slow_down", 2)
    assert scheduler.acquire(5, "a", 0, Claim("y")) == []


def test_a_refusal_while_loading_estimates_the_rest_of_the_load() -> None:
    scheduler = make(slots=1, rejects_loading=True)
    refusal, start = scheduler.acquire(1, "a", 0, Claim("x"))
    assert isinstance(refusal, Refuse)
    assert isinstance(start, Start)
    assert refusal.code == "model_loading"
    assert scheduler.on_ready("i1", 40) == [Done(1)]
    assert grants(scheduler.acquire(2, "a", 41, Claim("x"))) == [2]
    scheduler.return_slots("i1", 1, 42, [EndedRequest("x")])
    scheduler.on_exited("i1", "killed", 200)
    (again, _) = scheduler.acquire(3, "a", 200, Claim("x"))
    assert isinstance(again, Refuse)
    assert again.retry_after == 40
    (later,) = scheduler.acquire(4, "a", 210, Claim("x"))
    assert isinstance(later, Refuse)
    assert later.retry_after == 30


def test_a_failed_load_refuses_its_waiters_and_backs_off() -> None:
    scheduler = make()
    scheduler.acquire(1, "a", 0)
    scheduler.load(2, "a", 0)
    decisions = scheduler.on_exited("i1", "the file is cut off", 1)
    assert [type(decision) for decision in decisions] == [Refuse, Refuse]
    (refusal,) = scheduler.acquire(3, "a", 1.5)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "model_load_failed"
    assert "the file is cut off" in refusal.message
    assert refusal.retry_after == 1.5
    assert scheduler.acquire(4, "a", 3) == [Start("i2", "a")]


def test_the_back_off_grows_and_a_load_command_overrides_it() -> None:
    scheduler = make()
    now, waits = 0.0, []
    for waiter in range(8):
        (start,) = scheduler.acquire(waiter, "a", now)
        assert isinstance(start, Start)
        scheduler.on_exited(start.instance, "no", now)
        failure = scheduler.models["a"].failure
        assert failure is not None
        waits.append(failure.retry_at - now)
        now = failure.retry_at
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    assert scheduler.load(99, "a", now - 50) == [Start("i9", "a")]


def test_the_first_crash_restarts_at_once_and_the_second_backs_off() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.on_exited(instance, "killed by signal 9", 1) == []
    assert scheduler.acquire(2, "a", 1) == [Start("i2", "a")]
    scheduler.on_ready("i2", 2)
    scheduler.on_exited("i2", "killed by signal 9", 3)
    (refusal,) = scheduler.acquire(3, "a", 3)
    assert isinstance(refusal, Refuse)
