"""Slots of an instance: their number, their batches, and the share of each key."""

from __future__ import annotations

from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.decisions import Decision, Grant, Revoke
from llm_api_server.manager.scheduling.fair_queue import ACTIVE_TIME
from tests.unit.manager.scheduling.cases import (
    grants,
    make,
    ready,
)


def test_no_more_requests_run_than_there_are_slots() -> None:
    scheduler = make(slots=2)
    ready(scheduler)
    claim = Claim("x")
    assert [grants(scheduler.acquire(waiter, "a", 1, claim)) for waiter in (1, 2, 3, 4)] == [[1], [2], [], []]
    assert grants(scheduler.return_slots("i1", 1, 2, [EndedRequest("x")])) == [3]
    assert grants(scheduler.return_slots("i1", 2, 3, [EndedRequest("x"), EndedRequest("x")])) == [4]


def test_the_last_slot_is_reserved_for_other_active_keys() -> None:
    scheduler = make(slots=3)
    ready(scheduler)
    assert grants(scheduler.acquire(1, "a", 1, Claim("y"))) == [1]
    scheduler.return_slots("i1", 1, 2, [EndedRequest("y")])
    taken = [grants(scheduler.acquire(waiter, "a", 3, Claim("x"))) for waiter in (2, 3, 4)]
    assert taken == [[2], [3], []]
    assert grants(scheduler.acquire(5, "a", 4, Claim("y"))) == [5]
    assert grants(scheduler.acquire(6, "a", 4, Claim("y"))) == []
    later = 4 + ACTIVE_TIME + 1
    scheduler.return_slots("i1", 1, later, [EndedRequest("y")])
    assert grants(scheduler.acquire(7, "a", later, Claim("x"))) == []


def test_a_key_alone_uses_all_slots() -> None:
    scheduler = make(slots=3)
    ready(scheduler)
    assert [grants(scheduler.acquire(waiter, "a", 1, Claim("x"))) for waiter in (1, 2, 3)] == [[1], [2], [3]]


def test_workers_hold_a_batch_of_many_slots_until_others_wait() -> None:
    scheduler = make(slots=100)
    ready(scheduler)
    (first,) = scheduler.acquire(1, "a", 1, Claim("x"))
    assert first == Grant(1, "i1", 13, True, "x")
    decisions: list[Decision] = []
    waiter = 1
    while not any(isinstance(one, Revoke) for one in decisions):
        waiter += 1
        decisions = scheduler.acquire(waiter, "a", 1, Claim("x"))
    assert grants(decisions) == []
    allocation = scheduler.allocations["i1"]
    assert allocation.held_slots == 100
    assert scheduler.acquire(waiter + 1, "a", 1, Claim("y")) == []
    given = scheduler.return_slots("i1", 1, 2)
    assert [(one.slots, one.until_revoked) for one in given if isinstance(one, Grant)] == [(1, False)]
    given = scheduler.return_slots("i1", 20, 3)
    assert [(one.slots, one.until_revoked) for one in given if isinstance(one, Grant)] == [(3, True)]
    assert not scheduler.is_revoked("i1")


def test_a_light_request_needs_no_slot() -> None:
    scheduler = make(slots=1)
    ready(scheduler)
    scheduler.acquire(1, "a", 1, Claim("x"))
    assert grants(scheduler.acquire(2, "a", 1, Claim("x", cost=0, is_light=True))) == [2]
    assert grants(scheduler.acquire(3, "a", 1, Claim("x"))) == []
    assert grants(scheduler.return_slots("i1", 1, 2, [EndedRequest("x")])) == []
    assert grants(scheduler.return_slots("i1", 1, 3, [EndedRequest("x")])) == [3]


def test_prompts_in_prefill_are_bounded_by_one_batch() -> None:
    scheduler = make(slots=4)
    ready(scheduler)
    claim = Claim("x", prefill_tokens=200)
    assert [grants(scheduler.acquire(waiter, "a", 1, claim)) for waiter in (1, 2)] == [[1], []]
    assert grants(scheduler.on_prefill_done("i1", 1, 2)) == [2]
    assert scheduler.on_prefill_done("i1", 1, 3) == [], "known already"


def test_a_long_prompt_holds_back_others_only_for_a_while() -> None:
    scheduler = make(slots=4)
    ready(scheduler)
    scheduler.acquire(1, "a", 1, Claim("x", prefill_tokens=100_000))
    assert grants(scheduler.acquire(2, "a", 2, Claim("x", prefill_tokens=100_000))) == []
    at = scheduler.next_tick(2)
    assert at == 6
    assert grants(scheduler.tick(at)) == [2]
