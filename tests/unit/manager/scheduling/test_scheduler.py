"""The scheduler's promises: single cases first, then any interleaving of events under a hypothesis state machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import DrainReason, Model, Policy
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram

NAMES = ("a", "b", "c")
#: What the models of the state machine need where there are devices: `b` of one GPU or of two.
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


def make(
    max_loaded: int = 1,
    *,
    unload_timeout: float = 0,
    preload: tuple[str, ...] = (),
    devices: Sequence[Device] = (),
    sleep_timeout: float = 0,
    slots: int = 16,
) -> Scheduler:
    numbers = count(1)
    models = [Model(name, unload_timeout, name in preload, slots=slots) for name in NAMES]
    policy = Policy(
        max_loaded,
        min_loaded_time=1,
        max_wait_time=5,
        sleep_timeout=sleep_timeout,
        deep_sleep_timeout=2 * sleep_timeout,
        sleep_bytes=16 * GIB,
    )
    return Scheduler(policy, models, lambda: f"i{next(numbers)}", devices)


def loaded(scheduler: Scheduler, name: str, waiter: int, now: float) -> str:
    """Load `name` for `waiter`; answers the instance with one grant outstanding."""
    (start,) = scheduler.acquire(waiter, name, now)
    assert isinstance(start, Start)
    assert scheduler.on_ready(start.instance, now) == [Grant(waiter, start.instance)]
    return start.instance


def test_many_waiters_cause_one_load() -> None:
    scheduler = make()
    decisions = [scheduler.acquire(waiter, "a", 0) for waiter in range(16)]
    assert decisions == [[Start("i1", "a")], *[[] for _ in range(15)]]
    assert scheduler.on_ready("i1", 1) == [Grant(waiter, "i1") for waiter in range(16)]


def test_ready_model_is_granted_at_once() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.acquire(2, "a", 0) == [Grant(2, instance)]


def test_idle_model_makes_room_after_its_minimum_time() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.return_slots(instance, 1, 0.1)
    assert scheduler.acquire(2, "b", 0.2) == []
    assert scheduler.next_tick(0.2) == 1
    assert scheduler.tick(1) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 1.5) == [Start("i2", "b")]


def test_busy_model_is_not_evicted_but_drains_after_the_longest_wait() -> None:
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


def test_draining_model_serves_on_when_nobody_needs_its_room_any_more() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.acquire(2, "b", 2)
    scheduler.tick(7)
    scheduler.acquire(3, "a", 8)
    assert scheduler.cancel(2, "b", 9) == [Grant(3, instance)]
    assert scheduler.models["a"].state is ModelState.READY


def test_least_recently_used_goes_first_and_preloaded_last() -> None:
    scheduler = make(max_loaded=2, preload=("a",))
    assert scheduler.preload(0) == [Start("i1", "a")]
    scheduler.on_ready("i1", 0)
    second = loaded(scheduler, "b", 1, 5)
    scheduler.return_slots(second, 1, 6)
    assert scheduler.acquire(2, "c", 10) == [Stop(second)]


def test_preload_alone_does_not_push_out_another_model() -> None:
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


def test_failed_load_refuses_all_who_wait_and_backs_off() -> None:
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


def test_backoff_grows_and_a_load_command_overrides_it() -> None:
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


def test_first_crash_is_restarted_at_once_a_loop_is_not() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.on_exited(instance, "killed by signal 9", 1) == []
    assert scheduler.acquire(2, "a", 1) == [Start("i2", "a")]
    scheduler.on_ready("i2", 2)
    scheduler.on_exited("i2", "killed by signal 9", 3)
    (refusal,) = scheduler.acquire(3, "a", 3)
    assert isinstance(refusal, Refuse)


def test_unload_waits_for_what_is_in_flight() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.unload(2, "a", 1) == [Revoke(instance)]
    assert scheduler.return_slots(instance, 1, 5) == [Stop(instance)]
    assert scheduler.on_stopped(instance, 6) == [Done(2)]
    assert scheduler.unload(3, "a", 7) == [Done(3)]


def test_request_during_unload_gets_a_fresh_instance() -> None:
    scheduler = make()
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.unload(2, "a", 1)
    assert scheduler.acquire(3, "a", 2) == []
    scheduler.return_slots(instance, 1, 3)
    assert scheduler.on_stopped(instance, 4) == [Done(2), Start("i2", "a")]
    assert scheduler.on_ready("i2", 5) == [Grant(3, "i2")]


def test_idle_model_is_unloaded_after_its_timeout() -> None:
    scheduler = make(unload_timeout=10)
    instance = loaded(scheduler, "a", 1, 0)
    assert scheduler.next_tick(5) is None
    scheduler.return_slots(instance, 1, 20)
    assert scheduler.next_tick(20) == 30
    assert scheduler.tick(29) == []
    assert scheduler.tick(30) == [Stop(instance)]


def test_adopted_instance_waits_for_the_workers_to_report() -> None:
    scheduler = make()
    scheduler.adopt("old", "a", 0)
    assert scheduler.acquire(1, "b", 1) == []
    scheduler.restore_slots("old", 1)
    assert scheduler.tick(5) == []
    assert scheduler.return_slots("old", 1, 5.5) == [Stop("old")]


def test_too_many_adopted_instances_are_brought_down_to_the_limit() -> None:
    scheduler = make(max_loaded=1)
    scheduler.adopt("old-a", "a", 0)
    scheduler.adopt("old-b", "b", 0)
    assert scheduler.next_tick(0) == 5
    assert scheduler.tick(5) == [Stop("old-a")]


def test_a_remote_model_takes_no_place() -> None:
    scheduler = make(max_loaded=1)
    scheduler.models["b"].is_local = False
    instance = loaded(scheduler, "a", 1, 0)
    remote = loaded(scheduler, "b", 2, 0)
    scheduler.return_slots(remote, 1, 1)
    scheduler.return_slots(instance, 1, 9)
    assert scheduler.acquire(3, "c", 10) == [Stop(instance)]


def test_shut_down_refuses_the_queue_and_stops_everything() -> None:
    scheduler = make(max_loaded=2)
    instance = loaded(scheduler, "a", 1, 0)
    scheduler.acquire(2, "b", 1)
    decisions = scheduler.shut_down()
    assert [type(decision) for decision in decisions] == [Refuse, Stop, Stop]
    assert Stop(instance) in decisions
    assert isinstance(scheduler.acquire(3, "a", 2)[0], Refuse)


class AnyInterleaving(RuleBasedStateMachine):
    """Plays the manager and the engines: obeys decisions, and lets anything happen at any time."""

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
            preload=("c",) if preload else (),
            devices=self.devices,
        )
        for name, facts in needs.items():
            self.scheduler.update_facts(name, replace(facts, slots=slots))
        self.slots = slots
        self.needs = needs
        self.obey(self.scheduler.preload(self.now))

    def obey(self, decisions: list[Decision]) -> None:
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
                    self.obey_grant(decision)
                case Done(waiter):
                    del self.commands[waiter]
                case Refuse(waiter):
                    assert (self.waiting.pop(waiter, None) or self.commands.pop(waiter, None)) is not None

    def obey_grant(self, grant: Grant) -> None:
        instance = grant.instance
        assert self.waiting.pop(grant.waiter) == self.processes[instance], "granted the wrong model"
        assert instance not in self.stopping, "granted a dying instance"
        self.grants[instance] = self.grants.get(instance, 0) + grant.slots
        assert self.grants[instance] <= (self.slots or math.inf), "more than it can work on"
        assert grant.until_revoked or grant.slots == 1, "what goes back with its request is for one request"
        if not grant.until_revoked:
            self.running.setdefault(instance, []).append(self.keys[grant.waiter])

    def occupy(self, instance: str, taken: dict[str, int]) -> None:
        """It has this memory from now on, and everything fits."""
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
        """Its unload was ordered, or somebody has waited for another model for the longest allowed time."""
        waited = [self.now - since for waiter, since in self.since.items() if waiter in self.waiting | self.commands]
        return name in self.unloads or max(waited, default=0) >= 5

    def is_pinned(self, instance: str) -> bool:
        return self.scheduler.models[self.processes[instance]].is_pinned

    def is_kept(self, instance: str) -> bool:
        """Pinned and awake, and nobody ordered its end or another configuration."""
        allocation = self.scheduler.allocations[instance]
        return (
            self.is_pinned(instance)
            and allocation.sleep_level == 0
            and allocation.drain_reason is not DrainReason.COMMAND
        )

    def gone(self, instance: str) -> None:
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

    def slept(self, instance: str) -> None:
        allocation = self.scheduler.allocations[instance]
        self.asleep.add(instance)
        self.taken[instance] = allocation.memory_asleep(allocation.sleep_level)
        self.obey(self.scheduler.on_slept(instance, self.now))

    @rule(name=st.sampled_from(NAMES), key=st.sampled_from(["x", "y"]), is_batch=st.booleans())
    def acquire(self, name: str, key: str, *, is_batch: bool) -> None:
        if name not in self.configured:
            return
        waiter = next(self.ids)
        self.waiting[waiter], self.since[waiter], self.keys[waiter] = name, self.now, key
        self.obey(self.scheduler.acquire(waiter, name, self.now, Claim(key, cost=10, is_batch=is_batch)))

    @rule(name=st.sampled_from(NAMES), is_load=st.booleans())
    def command(self, name: str, *, is_load: bool) -> None:
        if name not in self.configured:
            return
        waiter = next(self.ids)
        self.commands[waiter], self.since[waiter] = name, self.now
        if not is_load:
            self.unloads.add(name)
        verb = self.scheduler.load if is_load else self.scheduler.unload
        self.obey(verb(waiter, name, self.now))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), is_pinned=st.booleans())
    def pin(self, data: st.DataObject, *, is_pinned: bool) -> None:
        name = self.processes[self.pick(data, list(self.processes))]
        verb = self.scheduler.pin if is_pinned else self.scheduler.unpin
        self.obey(verb(name, self.now))

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
        self.obey(self.scheduler.configure(policy, models, changed & names, self.now))
        self.configured = names
        assert {name for name, model in self.scheduler.models.items() if not model.is_removed} == names

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        self.obey(self.scheduler.cancel(waiter, self.waiting.pop(waiter), self.now))

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        instance = self.pick(data, [i for i, n in self.grants.items() if n])
        self.give_back(instance, data.draw(st.integers(1, self.grants[instance])))

    def give_back(self, instance: str, number: int) -> None:
        """`number` slots, and with them the requests that were asked for."""
        self.grants[instance] -= number
        running = self.running.get(instance, [])
        ended, self.running[instance] = running[:number], running[number:]
        self.obey(self.scheduler.return_slots(instance, number, self.now, [EndedRequest(key, 3) for key in ended]))

    @precondition(lambda self: self.starting())
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.obey(self.scheduler.on_ready(self.pick(data, self.starting()), self.now))

    @precondition(lambda self: self.falling_asleep())
    @rule(data=st.data(), works=st.booleans())
    def sleep_ends(self, data: st.DataObject, *, works: bool) -> None:
        instance = self.pick(data, self.falling_asleep())
        if works:
            self.slept(instance)
        else:
            self.obey(self.scheduler.on_sleep_failed(instance, self.now))

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), gib=st.sampled_from([0, 1, 8]))
    def others_come_and_go(self, data: st.DataObject, gib: int) -> None:
        self.foreign[data.draw(st.sampled_from(self.devices)).id] = gib * GIB
        self.scheduler.update_foreign(self.foreign)

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def stopped(self, data: st.DataObject) -> None:
        instance = self.pick(data, list(self.stopping))
        self.gone(instance)
        self.obey(self.scheduler.on_stopped(instance, self.now))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        instance = self.pick(data, list(self.processes))
        self.gone(instance)
        self.obey(self.scheduler.on_exited(instance, "killed", self.now))

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.obey(self.scheduler.tick(self.now))

    @invariant()
    def books_agree(self) -> None:
        queued = {w for model in self.scheduler.models.values() for w in (*model.queue, *model.load_waiters)}
        stop_waiters = {w for model in self.scheduler.models.values() for w in model.unload_waiters}
        assert queued | stop_waiters == self.waiting.keys() | self.commands.keys(), "a waiter was lost"
        for name, model in self.scheduler.models.items():
            if model.allocation is not None:
                assert self.processes[model.allocation.id] == name
                assert model.allocation.held_slots == self.grants.get(model.allocation.id, 0)
            if model.state is ModelState.READY and model.queue:
                assert model.allocation is not None
                assert model.slots is not None, "somebody waits where there is always a place"
                kept = 1 if 1 < model.slots <= FEW_SLOTS else 0
                assert model.slots - model.allocation.held_slots <= kept, "somebody waits where there is a place"

    def teardown(self) -> None:
        """However it stands: when engines obey and clients finish, everybody is answered."""
        for _ in range(1000 if hasattr(self, "scheduler") else 0):
            if not self.waiting and not self.commands:
                break
            self.step_of_a_fair_world()
        assert not self.waiting, "deadlock"
        assert not self.commands, "deadlock"

    def step_of_a_fair_world(self) -> None:
        """Everything under way happens; if nothing is, time goes to the next tick the scheduler asked for."""
        moved = False
        for instance in list(self.stopping):
            moved = True
            self.gone(instance)
            self.obey(self.scheduler.on_stopped(instance, self.now))
        for instance in self.falling_asleep():
            moved = True
            self.slept(instance)
        for instance in self.starting():
            moved = True
            self.obey(self.scheduler.on_ready(instance, self.now))
        for instance, number in [(i, n) for i, n in self.grants.items() if n]:
            moved = True
            self.give_back(instance, number)
        if not moved:
            at = self.scheduler.next_tick(self.now)
            assert at is not None, "somebody waits and nothing will happen"
            self.now = max(self.now, at)
            self.obey(self.scheduler.tick(self.now))


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
