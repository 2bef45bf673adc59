"""The scheduler under load: slots, turns, bounded queues, few swaps, a longest wait; by a clock of the test."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import count

from llm_api_server.engines.base import ModelFacts
from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.decisions import Decision, Done, Grant, Refuse, Revoke, Start, Stop
from llm_api_server.manager.scheduling.fair_queue import ACTIVE_TIME
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model, Policy

LOAD, STOP = 3.0, 0.5
MIN_LOADED, MAX_WAIT = 1.0, 5.0


def make(slots: int | None, *, models: str = "abc", **policy: object) -> Scheduler:
    numbers = count(1)
    options = {"max_loaded": 1, "min_loaded_time": MIN_LOADED, "max_wait_time": MAX_WAIT, **policy}
    scheduler = Scheduler(Policy(**options), [Model(name, 0) for name in models], lambda: f"i{next(numbers)}")  # type: ignore[arg-type]
    for name in models:
        scheduler.update_facts(name, ModelFacts(slots=slots))
    return scheduler


def ready(scheduler: Scheduler, name: str = "a") -> None:
    scheduler.load(0, name, 0)
    scheduler.on_ready("i1", 0)


def grants(decisions: list[Decision]) -> list[int]:
    return [one.waiter for one in decisions if isinstance(one, Grant)]


# ── slots ──


def test_no_more_run_than_there_are_places() -> None:
    scheduler = make(2)
    ready(scheduler)
    claim = Claim("x")
    assert [grants(scheduler.acquire(waiter, "a", 1, claim)) for waiter in (1, 2, 3, 4)] == [[1], [2], [], []]
    assert grants(scheduler.return_slots("i1", 1, 2, [EndedRequest("x")])) == [3]
    assert grants(scheduler.return_slots("i1", 2, 3, [EndedRequest("x"), EndedRequest("x")])) == [4]


def test_the_last_place_is_left_to_other_keys_while_they_ask() -> None:
    scheduler = make(3)
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


def test_who_is_alone_has_all_places() -> None:
    scheduler = make(3)
    ready(scheduler)
    assert [grants(scheduler.acquire(waiter, "a", 1, Claim("x"))) for waiter in (1, 2, 3)] == [[1], [2], [3]]


def test_of_many_places_workers_keep_some_until_others_wait() -> None:
    scheduler = make(100)
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


def test_light_work_needs_no_place() -> None:
    scheduler = make(1)
    ready(scheduler)
    scheduler.acquire(1, "a", 1, Claim("x"))
    assert grants(scheduler.acquire(2, "a", 1, Claim("x", cost=0, is_light=True))) == [2]
    assert grants(scheduler.acquire(3, "a", 1, Claim("x"))) == []
    assert grants(scheduler.return_slots("i1", 1, 2, [EndedRequest("x")])) == []
    assert grants(scheduler.return_slots("i1", 1, 3, [EndedRequest("x")])) == [3]


# ── bounded queues ──


def test_a_full_queue_says_when_to_come_again() -> None:
    scheduler = make(1, queue_per_model=3)
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
    scheduler = make(1, queue_per_key=2)
    ready(scheduler)
    for waiter, model in enumerate("aab", 1):
        scheduler.acquire(waiter, model, 0, Claim("x"))
    (refusal,) = scheduler.acquire(4, "a", 0, Claim("x"))
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.position) == ("slow_down", 2)
    assert scheduler.acquire(5, "a", 0, Claim("y")) == []


def test_who_does_not_wait_for_loads_is_told_how_long_the_last_one_took() -> None:
    scheduler = make(1, rejects_loading=True)
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


# ── whole traffic ──


@dataclass(order=True)
class Event:
    at: float
    number: int
    what: str = ""
    name: str = ""
    key: str = ""


class Machine:
    """Engines that take `LOAD` and `STOP` seconds, and requests that take `work` seconds, by a clock of its own."""

    def __init__(self, scheduler: Scheduler, work: float) -> None:
        self.scheduler = scheduler
        self.work = work
        self.now = 0.0
        self.starts: list[str] = []
        self.waited: dict[int, float] = {}
        self.done: list[str] = []
        self._asked: dict[int, tuple[float, str, str]] = {}
        self._events: list[Event] = []
        self._numbers = count(1)

    def ask_at(self, at: float, model: str, key: str = "x") -> None:
        self._push(at, "ask", model, key)

    def run(self) -> None:
        while self._events or self._asked:
            tick = self.scheduler.next_tick(self.now)
            if tick is not None and (not self._events or tick < self._events[0].at):
                self.now = max(self.now, tick)
                self._obey(self.scheduler.tick(self.now))
                continue
            assert self._events, "somebody waits and nothing will happen"
            event = heapq.heappop(self._events)
            self.now = event.at
            self._happens(event)

    def _happens(self, event: Event) -> None:
        scheduler, now = self.scheduler, self.now
        match event.what:
            case "ask":
                waiter = next(self._numbers)
                self._asked[waiter] = (now, event.name, event.key)
                self._obey(scheduler.acquire(waiter, event.name, now, Claim(event.key, cost=10)))
            case "ready":
                self._obey(scheduler.on_ready(event.name, now))
            case "stopped":
                self._obey(scheduler.on_stopped(event.name, now))
            case "end":
                self.on_end(event.key)
                self._obey(scheduler.return_slots(event.name, 1, now, [EndedRequest(event.key)]))

    def on_end(self, key: str) -> None:
        """A request of `key` is over."""

    def _push(self, at: float, what: str, name: str, key: str = "") -> None:
        heapq.heappush(self._events, Event(at, next(self._numbers), what, name, key))

    def _obey(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(instance, model):
                    self.starts.append(model)
                    self._push(self.now + LOAD, "ready", instance)
                case Stop(instance):
                    assert self.scheduler.allocations[instance].held_slots == 0, "cut"
                    self._push(self.now + STOP, "stopped", instance)
                case Grant(waiter, instance):
                    asked, model, key = self._asked.pop(waiter)
                    assert self.scheduler.allocations[instance].model == model
                    self.waited[waiter] = self.now - asked
                    self.done.append(f"{key}:{model}")
                    self._push(self.now + self.work, "end", instance, key)
                case Refuse():
                    raise AssertionError(decision)


def test_requests_for_several_models_cost_as_few_swaps_as_can_be() -> None:
    machine = Machine(make(1), work=0.5)
    for model in "aabacabc":
        machine.ask_at(0, model)
    machine.run()
    assert machine.starts == ["a", "b", "c"]
    assert "".join(one[-1] for one in machine.done) == "aaaabbcc"


def test_whoever_waited_for_a_model_is_served_before_it_goes() -> None:
    """Longer than the others would wait for a busy one, as far as `max_wait_time` allows."""
    machine = Machine(make(1), work=0.5)
    for model in "ab" * 8:
        machine.ask_at(0, model)
    machine.run()
    assert machine.starts == ["a", "b"]
    machine = Machine(make(1), work=2)
    for model in "ab" * 8:
        machine.ask_at(0, model)
    machine.run()
    assert "".join(machine.starts) == "ababab"


def test_a_thousand_random_swaps_lose_nobody_and_keep_the_longest_wait() -> None:
    """16 clients, 3 models, one place for a model: none waits longer than it takes the two others to have their turn.

    A turn is a stop, a load, `max_wait_time`, and what then still runs.
    """
    chance = random.Random(1)
    machine = Clients(make(4), chance, clients=16, requests=9000)
    machine.begin()
    machine.run()
    turn = STOP + LOAD + MAX_WAIT + machine.work
    assert len(machine.waited) == machine.total
    assert len(machine.starts) >= 1000
    assert max(machine.waited.values()) <= 3 * turn


class Clients(Machine):
    """Each asks for any model as soon as it has its answer."""

    def __init__(self, scheduler: Scheduler, chance: random.Random, clients: int, requests: int) -> None:
        super().__init__(scheduler, work=1)
        self.total = requests
        self._chance = chance
        self._clients = [f"key{n}" for n in range(clients)]
        self._left = requests

    def begin(self) -> None:
        for key in self._clients:
            self.on_end(key)

    def on_end(self, key: str) -> None:
        if self._left:
            self._left -= 1
            self.ask_at(self.now + self._chance.random(), self._chance.choice("abc"), key)


def test_a_key_that_asks_for_little_hardly_waits_beside_one_that_floods() -> None:
    machine = Machine(make(4), work=2)
    scheduler = machine.scheduler
    ready(scheduler)
    for n in range(400):
        machine.ask_at(n * 0.05, "a", "flood")
    for n in range(10):
        machine.ask_at(n * 2.5, "a", "small")
    machine.run()
    small = [wait for wait, name in zip(machine.waited.values(), machine.done, strict=True) if name == "small:a"]
    flood = [wait for wait, name in zip(machine.waited.values(), machine.done, strict=True) if name == "flood:a"]
    assert max(small) == 0
    assert max(flood) > 100
