"""Promises of the scheduler under any interleaving of events, by a hypothesis state machine."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import ModelFacts, Need, SleepFootprint
from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.concurrency import FEW_SLOTS
from llm_api_server.manager.scheduling.decisions import Decision, Done, Grant, Refuse, Revoke, Sleep, Start, Stop, Wake
from llm_api_server.manager.scheduling.memory import memory_of
from llm_api_server.manager.scheduling.state import DrainReason, Model
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram
from tests.unit.manager.scheduling.cases import (
    NAMES,
    make,
)

#: Facts of the models on hosts with devices; `b` needs one GPU or two.
NEEDS = [
    {
        "a": ModelFacts(
            need=Need("gpu", 10 * GIB, share=0.5, measures_memory=True), sleep_footprint=SleepFootprint(GIB, 10 * GIB)
        ),
        "b": ModelFacts(
            need=Need("gpu", 12 * GIB, count=count_of_b, share=0.9, is_share_soft=True, measures_memory=True),
            sleep_footprint=SleepFootprint(GIB, 10 * GIB),
        ),
        "c": ModelFacts(need=Need("gpu", 9 * GIB)),
    }
    for count_of_b in (1, 2)
]


MACHINES: tuple[list[Device], ...] = (
    [],
    [*gpus(24), ram(32)],
    [*gpus(24), ram(8)],
    [*gpus(24, 24), ram(32)],
    [*gpus(24, 24, 48), ram(32)],
)


class AnyInterleaving(RuleBasedStateMachine):
    """Stands for the manager and the engines: carries out decisions, and lets any event happen at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ids = count(1)
        self.waiting: dict[int, str] = {}
        self.since: dict[int, float] = {}
        self.commands: dict[int, str] = {}
        self.unloads: set[str] = set()
        self.grants: dict[str, int] = {}
        self.keys: dict[int, str] = {}
        self.running: dict[str, list[str]] = {}
        self.processes: dict[str, str] = {}
        self.stopping: set[str] = set()
        self.taken: dict[str, dict[str, int]] = {}
        self.asleep: set[str] = set()
        self.foreign: dict[str, int] = {}
        self.configured = set(NAMES)

    @initialize(
        max_loaded=st.integers(1, 3),
        unload_timeout=st.sampled_from([0, 30]),
        sleep_timeout=st.sampled_from([0, 10]),
        preload=st.booleans(),
        machine=st.integers(0, len(MACHINES) - 1),
        needs=st.sampled_from(NEEDS),
        slots=st.sampled_from([1, 2, 3, 50, None]),
    )
    def begin(
        self,
        max_loaded: int,
        unload_timeout: float,
        sleep_timeout: float,
        machine: int,
        needs: dict[str, ModelFacts],
        slots: int | None,
        *,
        preload: bool,
    ) -> None:
        self.max_loaded = max_loaded
        self.devices = MACHINES[machine]
        self.scheduler = make(
            max_loaded,
            unload_timeout=unload_timeout,
            sleep_timeout=sleep_timeout,
            deep_sleep_timeout=2 * sleep_timeout,
            preload=("c",) if preload else (),
            devices=self.devices,
        )
        for name, facts in needs.items():
            self.scheduler.update_facts(name, replace(facts, slots=slots))
        self.slots = slots
        self.needs = needs
        self.carry_out(self.scheduler.preload(self.now))

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Start(instance, name, placement):
                    assert name not in self.processes.values(), "two processes of one model"
                    self.processes[instance] = name
                    self.occupy(instance, memory_of(placement))
                case Wake(instance):
                    assert instance in self.asleep, "woken while awake"
                    self.asleep.discard(instance)
                    self.occupy(instance, self.scheduler.allocations[instance].memory_awake)
                case Sleep(instance, _, from_level):
                    assert self.grants.get(instance, 0) == 0, "a busy model was put to sleep"
                    assert (instance in self.asleep) == (from_level > 0)
                    assert from_level or not self.is_pinned(instance), "a pinned model was put to sleep"
                    if from_level:  # it wakes in between
                        self.asleep.discard(instance)
                        self.occupy(instance, self.scheduler.allocations[instance].memory_awake)
                case Stop(instance):
                    assert self.grants.get(instance, 0) == 0, "a busy model was stopped"
                    assert instance not in self.stopping, "stopped twice"
                    assert not self.is_kept(instance), "a pinned model was unloaded"
                    self.stopping.add(instance)
                case Revoke(instance):
                    assert self.grants.get(instance, 0) > 0, "drained what could be stopped"
                    if self.scheduler.models[self.processes[instance]].state is ModelState.DRAINING:
                        assert self.may_drain(self.processes[instance]), "a busy model was drained too early"
                case Grant():
                    self.carry_out_grant(decision)
                case Done(waiter):
                    del self.commands[waiter]
                case Refuse(waiter):
                    assert (self.waiting.pop(waiter, None) or self.commands.pop(waiter, None)) is not None

    def carry_out_grant(self, grant: Grant) -> None:
        instance = grant.instance
        assert self.waiting.pop(grant.waiter) == self.processes[instance], "granted the wrong model"
        assert instance not in self.stopping, "granted a dying instance"
        self.grants[instance] = self.grants.get(instance, 0) + grant.slots
        assert self.grants[instance] <= (self.slots or math.inf), "more slots than the instance has"
        assert grant.until_revoked or grant.slots == 1, "a slot that is returned with its request is a single one"
        if not grant.until_revoked:
            self.running.setdefault(instance, []).append(self.keys[grant.waiter])

    def occupy(self, instance: str, taken: dict[str, int]) -> None:
        """Count the memory of an instance, and check that everything fits."""
        self.taken[instance] = taken
        assert len(self.processes.keys() - self.asleep) <= self.max_loaded, "above max_loaded"
        for device in [device for device in self.devices if taken.get(device.id)]:
            ours = sum(taken.get(device.id, 0) for taken in self.taken.values())
            assert ours + self.foreign.get(device.id, 0) <= device.total, "above what a device has"
        starting = [i for i in self.starting() if self.scheduler.models[self.processes[i]].need is not None]
        for one, other in combinations(starting, 2):
            if self.taken.get(one, {}).keys() & self.taken.get(other, {}).keys():
                needs = [self.scheduler.models[self.processes[i]].need for i in (one, other)]
                assert not any(need.measures_memory for need in needs if need), "two starts on a device, one measures"

    def may_drain(self, name: str) -> bool:
        """Return whether an unload was commanded, or another model has been waited for until `max_wait_time`."""
        waited = [self.now - since for waiter, since in self.since.items() if waiter in self.waiting | self.commands]
        return name in self.unloads or max(waited, default=0) >= 5

    def is_pinned(self, instance: str) -> bool:
        return self.scheduler.models[self.processes[instance]].is_pinned

    def is_kept(self, instance: str) -> bool:
        """Return whether it is pinned and awake, and no command or reload ends it."""
        allocation = self.scheduler.allocations[instance]
        return (
            self.is_pinned(instance)
            and allocation.sleep_level == 0
            and allocation.drain_reason is not DrainReason.COMMAND
        )

    def remove(self, instance: str) -> None:
        del self.processes[instance]
        self.taken.pop(instance, None)
        self.asleep.discard(instance)
        self.stopping.discard(instance)
        self.grants.pop(instance, None)
        self.running.pop(instance, None)

    def pick(self, data: st.DataObject, pool: list[str]) -> str:
        return data.draw(st.sampled_from(sorted(pool)))

    def starting(self) -> list[str]:
        return [i for i, name in self.processes.items() if self.scheduler.models[name].state is ModelState.STARTING]

    def falling_asleep(self) -> list[str]:
        sleeping = [i for i, n in self.processes.items() if self.scheduler.models[n].state is ModelState.SLEEPING]
        return [instance for instance in sleeping if instance not in self.asleep]

    def fall_asleep(self, instance: str) -> None:
        allocation = self.scheduler.allocations[instance]
        self.asleep.add(instance)
        self.taken[instance] = allocation.memory_asleep(allocation.sleep_level)
        self.carry_out(self.scheduler.on_slept(instance, self.now))

    @rule(name=st.sampled_from(NAMES), key=st.sampled_from(["x", "y"]), is_batch=st.booleans())
    def acquire(self, name: str, key: str, *, is_batch: bool) -> None:
        if name not in self.configured:
            return
        waiter = next(self.ids)
        self.waiting[waiter], self.since[waiter], self.keys[waiter] = name, self.now, key
        self.carry_out(self.scheduler.acquire(waiter, name, self.now, Claim(key, cost=10, is_batch=is_batch)))

    @rule(name=st.sampled_from(NAMES), is_load=st.booleans())
    def command(self, name: str, *, is_load: bool) -> None:
        if name not in self.configured:
            return
        waiter = next(self.ids)
        self.commands[waiter], self.since[waiter] = name, self.now
        if not is_load:
            self.unloads.add(name)
        verb = self.scheduler.load if is_load else self.scheduler.unload
        self.carry_out(verb(waiter, name, self.now))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), is_pinned=st.booleans())
    def pin(self, data: st.DataObject, *, is_pinned: bool) -> None:
        name = self.processes[self.pick(data, list(self.processes))]
        verb = self.scheduler.pin if is_pinned else self.scheduler.unpin
        self.carry_out(verb(name, self.now))

    @rule(
        max_loaded=st.integers(1, 3),
        names=st.sets(st.sampled_from(NAMES), min_size=1),
        changed=st.sets(st.sampled_from(NAMES)),
        preload=st.booleans(),
    )
    def configure(self, max_loaded: int, names: set[str], changed: set[str], *, preload: bool) -> None:
        self.max_loaded = max_loaded
        self.unloads |= changed | set(NAMES)
        policy = replace(self.scheduler.policy, max_loaded=max_loaded)
        models = [Model(name, 30, preload and name == "c", slots=self.slots) for name in sorted(names)]
        for model in models:
            model.update_facts(replace(self.needs[model.name], slots=self.slots), counts_memory=bool(self.devices))
        self.carry_out(self.scheduler.configure(policy, models, changed & names, self.now))
        self.configured = names
        assert {name for name, model in self.scheduler.models.items() if not model.is_removed} == names

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        self.carry_out(self.scheduler.cancel(waiter, self.waiting.pop(waiter), self.now))

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        instance = self.pick(data, [i for i, n in self.grants.items() if n])
        self.return_slots(instance, data.draw(st.integers(1, self.grants[instance])))

    def return_slots(self, instance: str, number: int) -> None:
        """Return `number` slots, and end the requests that each asked for one."""
        self.grants[instance] -= number
        running = self.running.get(instance, [])
        ended, self.running[instance] = running[:number], running[number:]
        self.carry_out(self.scheduler.return_slots(instance, number, self.now, [EndedRequest(key, 3) for key in ended]))

    @precondition(lambda self: self.starting())
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.carry_out(self.scheduler.on_ready(self.pick(data, self.starting()), self.now))

    @precondition(lambda self: self.falling_asleep())
    @rule(data=st.data(), works=st.booleans())
    def sleep_ends(self, data: st.DataObject, *, works: bool) -> None:
        instance = self.pick(data, self.falling_asleep())
        if works:
            self.fall_asleep(instance)
        else:
            self.carry_out(self.scheduler.on_sleep_failed(instance, self.now))

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), gib=st.sampled_from([0, 1, 8]))
    def others_come_and_go(self, data: st.DataObject, gib: int) -> None:
        self.foreign[data.draw(st.sampled_from(self.devices)).id] = gib * GIB
        self.scheduler.update_foreign(self.foreign)

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def stopped(self, data: st.DataObject) -> None:
        instance = self.pick(data, list(self.stopping))
        self.remove(instance)
        self.carry_out(self.scheduler.on_stopped(instance, self.now))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        instance = self.pick(data, list(self.processes))
        self.remove(instance)
        self.carry_out(self.scheduler.on_exited(instance, "killed", self.now))

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.scheduler.tick(self.now))

    @invariant()
    def state_agrees(self) -> None:
        queued = {w for model in self.scheduler.models.values() for w in (*model.queue, *model.load_waiters)}
        stop_waiters = {w for model in self.scheduler.models.values() for w in model.unload_waiters}
        assert queued | stop_waiters == self.waiting.keys() | self.commands.keys(), "a waiter was lost"
        for name, model in self.scheduler.models.items():
            if model.allocation is not None:
                assert self.processes[model.allocation.id] == name
                assert model.allocation.held_slots == self.grants.get(model.allocation.id, 0)
            if model.state is ModelState.READY and model.queue:
                assert model.allocation is not None
                assert model.slots is not None, "a request waits though slots are unlimited"
                kept = 1 if 1 < model.slots <= FEW_SLOTS else 0
                assert model.slots - model.allocation.held_slots <= kept, "a request waits though a slot is free"

    def teardown(self) -> None:
        """Check that every waiter gets a response once engines and clients finish what they do."""
        for _ in range(1000 if hasattr(self, "scheduler") else 0):
            if not self.waiting and not self.commands:
                break
            self.step_of_a_fair_world()
        assert not self.waiting, "deadlock"
        assert not self.commands, "deadlock"

    def step_of_a_fair_world(self) -> None:
        """Complete everything under way; if there is nothing, advance the clock to the next tick."""
        moved = False
        for instance in list(self.stopping):
            moved = True
            self.remove(instance)
            self.carry_out(self.scheduler.on_stopped(instance, self.now))
        for instance in self.falling_asleep():
            moved = True
            self.fall_asleep(instance)
        for instance in self.starting():
            moved = True
            self.carry_out(self.scheduler.on_ready(instance, self.now))
        for instance, number in [(i, n) for i, n in self.grants.items() if n]:
            moved = True
            self.return_slots(instance, number)
        if not moved:
            at = self.scheduler.next_tick(self.now)
            assert at is not None, "a waiter would wait forever"
            self.now = max(self.now, at)
            self.carry_out(self.scheduler.tick(self.now))


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
