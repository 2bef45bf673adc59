"""Whole traffic against a scheduler with simulated engines: few swaps, bounded waits, fair shares."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import count

from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.decisions import Decision, Grant, Refuse, Start, Stop
from llm_api_server.manager.scheduling.scheduler import Scheduler
from tests.unit.manager.scheduling.cases import (
    MAX_WAIT,
    make,
    ready,
)

LOAD, STOP = 3.0, 0.5


@dataclass(order=True)
class Event:
    at: float
    number: int
    kind: str = ""
    name: str = ""
    key: str = ""


class Machine:
    """Engines that take `LOAD` and `STOP` seconds, and requests that take `duration` seconds, by a clock of its own."""

    def __init__(self, scheduler: Scheduler, duration: float) -> None:
        self.scheduler = scheduler
        self.duration = duration
        self.now = 0.0
        self.starts: list[str] = []
        self.waits: dict[int, float] = {}
        #: Key and model of each request, in the order in which they were granted.
        self.granted: list[str] = []
        self.arrivals: dict[int, tuple[float, str, str]] = {}
        self.events: list[Event] = []
        self.numbers = count(1)

    def request_at(self, at: float, model: str, key: str = "x") -> None:
        self.push(at, "request", model, key)

    def run(self) -> None:
        while self.events or self.arrivals:
            tick = self.scheduler.next_tick(self.now)
            if tick is not None and (not self.events or tick < self.events[0].at):
                self.now = max(self.now, tick)
                self.carry_out(self.scheduler.tick(self.now))
                continue
            assert self.events, "a request would wait forever"
            event = heapq.heappop(self.events)
            self.now = event.at
            self.handle(event)

    def handle(self, event: Event) -> None:
        scheduler, now = self.scheduler, self.now
        match event.kind:
            case "request":
                waiter = next(self.numbers)
                self.arrivals[waiter] = (now, event.name, event.key)
                self.carry_out(scheduler.acquire(waiter, event.name, now, Claim(event.key, cost=10)))
            case "ready":
                self.carry_out(scheduler.on_ready(event.name, now))
            case "stopped":
                self.carry_out(scheduler.on_stopped(event.name, now))
            case "end":
                self.on_end(event.key)
                self.carry_out(scheduler.return_slots(event.name, 1, now, [EndedRequest(event.key)]))

    def on_end(self, key: str) -> None:
        """Called when a request of `key` has ended."""

    def push(self, at: float, kind: str, name: str, key: str = "") -> None:
        heapq.heappush(self.events, Event(at, next(self.numbers), kind, name, key))

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(instance, model):
                    self.starts.append(model)
                    self.push(self.now + LOAD, "ready", instance)
                case Stop(instance):
                    assert self.scheduler.allocations[instance].held_slots == 0, "a request was cut off"
                    self.push(self.now + STOP, "stopped", instance)
                case Grant(waiter, instance):
                    arrived_at, model, key = self.arrivals.pop(waiter)
                    assert self.scheduler.allocations[instance].model == model
                    self.waits[waiter] = self.now - arrived_at
                    self.granted.append(f"{key}:{model}")
                    self.push(self.now + self.duration, "end", instance, key)
                case Refuse():
                    raise AssertionError(decision)


class Clients(Machine):
    """Clients that each send a request for a random model as soon as the last one has ended."""

    def __init__(self, scheduler: Scheduler, chance: random.Random, clients: int, requests: int) -> None:
        super().__init__(scheduler, duration=1)
        self.total = requests
        self.chance = chance
        self.clients = [f"key{n}" for n in range(clients)]
        self.left = requests

    def begin(self) -> None:
        for key in self.clients:
            self.on_end(key)

    def on_end(self, key: str) -> None:
        if self.left:
            self.left -= 1
            self.request_at(self.now + self.chance.random(), self.chance.choice("abc"), key)


def test_requests_for_several_models_cause_the_fewest_swaps() -> None:
    machine = Machine(make(slots=1), duration=0.5)
    for model in "aabacabc":
        machine.request_at(0, model)
    machine.run()
    assert machine.starts == ["a", "b", "c"]
    assert "".join(one[-1] for one in machine.granted) == "aaaabbcc"


def test_a_model_serves_its_queue_before_it_is_evicted() -> None:
    """Serve the queue as long as `max_wait_time` allows, though other models are waited for."""
    machine = Machine(make(slots=1), duration=0.5)
    for model in "ab" * 8:
        machine.request_at(0, model)
    machine.run()
    assert machine.starts == ["a", "b"]
    machine = Machine(make(slots=1), duration=2)
    for model in "ab" * 8:
        machine.request_at(0, model)
    machine.run()
    assert "".join(machine.starts) == "ababab"


def test_a_thousand_random_swaps_lose_no_request_and_bound_the_wait() -> None:
    """16 clients, 3 models, one loaded at a time: none waits longer than the two others may be loaded.

    A model is loaded for a stop, a load, `max_wait_time`, and what then still runs.
    """
    chance = random.Random(1)
    machine = Clients(make(slots=4), chance, clients=16, requests=9000)
    machine.begin()
    machine.run()
    turn = STOP + LOAD + MAX_WAIT + machine.duration
    assert len(machine.waits) == machine.total
    assert len(machine.starts) >= 1000
    assert max(machine.waits.values()) <= 3 * turn


def test_a_modest_key_does_not_wait_beside_a_flood() -> None:
    machine = Machine(make(slots=4), duration=2)
    scheduler = machine.scheduler
    ready(scheduler)
    for n in range(400):
        machine.request_at(n * 0.05, "a", "flood")
    for n in range(10):
        machine.request_at(n * 2.5, "a", "small")
    machine.run()
    small = [wait for wait, name in zip(machine.waits.values(), machine.granted, strict=True) if name == "small:a"]
    flood = [wait for wait, name in zip(machine.waits.values(), machine.granted, strict=True) if name == "flood:a"]
    assert max(small) == 0
    assert max(flood) > 100
