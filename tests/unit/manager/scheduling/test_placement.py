"""Where models go on machines of many kinds, who makes room, who sleeps, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import DeviceAllocation, ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.ipc.model_status import Explanation
from llm_api_server.manager.scheduling.concurrency import FEW_SLOTS
from llm_api_server.manager.scheduling.decisions import Decision, Grant, Refuse, Revoke, Sleep, Start, Stop, Wake
from llm_api_server.manager.scheduling.explain import explain
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model, Policy
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram


def whole(weights: float = 10, count: int = 1) -> ModelFacts:
    """What vLLM takes of GPUs unless told otherwise: 90 %, or what others leave."""
    return ModelFacts(need=Need("gpu", int(weights * GIB), count, 0.9, is_share_soft=True, measures_memory=True))


def part(share: float, weights: float = 5, *, sleeps: bool = False) -> ModelFacts:
    asleep = SleepFootprint(GIB, int(weights * GIB)) if sleeps else None
    return ModelFacts(need=Need("gpu", int(weights * GIB), 1, share, measures_memory=True), sleep_footprint=asleep)


def in_ram(size: float) -> ModelFacts:
    return ModelFacts(need=Need("ram", int(size * GIB)))


class World:
    """A scheduler whose engines obey at once, with a clock."""

    def __init__(self, devices: list[Device], models: dict[str, ModelFacts], **policy: float) -> None:
        numbers = count(1)
        options = {"max_loaded": 10, "min_loaded_time": 0, "max_wait_time": 5, **policy}
        entries = [Model(name, unload_timeout=1000) for name in models]
        self.scheduler = Scheduler(Policy(**options), entries, lambda: f"i{next(numbers)}", devices)  # type: ignore[arg-type]
        for name, facts in models.items():
            self.scheduler.update_facts(name, replace(facts, slots=FEW_SLOTS))
        self.now = 0.0
        self.waiters = count(1)

    def ask(self, model: str) -> list[Decision]:
        self.now += 1
        return self.scheduler.acquire(next(self.waiters), model, self.now)

    def load(self, model: str) -> Placement:
        """Ask for it, and let go of it when it is ready."""
        (start,) = self.ask(model)
        assert isinstance(start, Start)
        self.ready(model)
        self.release(model)
        return start.placement

    def ready(self, model: str) -> list[Decision]:
        return self.scheduler.on_ready(self.instance(model), self.now)

    def release(self, model: str) -> list[Decision]:
        self.now += 1
        return self.scheduler.return_slots(self.instance(model), 1, self.now)

    def stopped(self, model: str) -> list[Decision]:
        return self.scheduler.on_stopped(self.instance(model), self.now)

    def slept(self, model: str) -> list[Decision]:
        return self.scheduler.on_slept(self.instance(model), self.now)

    def tick(self) -> list[Decision]:
        """At the time that the scheduler asks for."""
        at = self.scheduler.next_tick(self.now)
        assert at is not None
        self.now = at
        return self.scheduler.tick(at)

    def instance(self, model: str) -> str:
        allocation = self.scheduler.models[model].allocation
        assert allocation is not None
        return allocation.id

    def explain(self, model: str) -> Explanation:
        return explain(self.scheduler, model)


def seats(placement: Placement) -> list[str]:
    return [seat.device for seat in placement.devices]


def test_one_gpu_holds_what_fits_and_then_the_oldest_makes_room() -> None:
    world = World(gpus(24), {"a": part(0.4), "b": part(0.4), "c": part(0.4)})
    assert seats(world.load("a")) == ["gpu0"]
    assert world.load("b").is_shared
    assert world.ask("c") == [Stop("i1")]
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.placement == Placement((DeviceAllocation("gpu0", int(0.4 * 24 * GIB), 24 * GIB, 0),), is_shared=True)


def test_a_model_goes_where_it_leaves_the_least() -> None:
    world = World(gpus(80, 24, 48), {"small": ModelFacts(need=Need("gpu", 20 * GIB)), "large": whole(40)})
    assert seats(world.load("small")) == ["gpu1"]
    assert seats(world.load("large")) == ["gpu2"]


def test_eight_gpus_take_models_side_by_side_and_evict_as_few_as_can_be() -> None:
    singles = {f"single{n}": whole() for n in range(4)}
    world = World(gpus(*[80] * 8), {**singles, "quad": whole(40, 4), "pair": whole(40, 2)})
    quad = world.load("quad")
    taken = [*seats(quad), *(seats(world.load(name))[0] for name in singles)]
    assert sorted(taken) == [f"gpu{n}" for n in range(8)]
    assert world.ask("pair") == [Stop(world.instance("quad"))], "one model goes rather than two"


def test_tensor_parallel_prefers_devices_of_one_size() -> None:
    world = World(gpus(24, 80, 24, 80), {"pair": whole(15, 2), "triple": whole(15, 3)})
    assert seats(world.load("pair")) == ["gpu0", "gpu2"]
    world.scheduler.unload(99, "pair", world.now)
    world.stopped("pair")
    assert len(seats(world.load("triple"))) == 3


def test_the_share_of_a_mixed_group_is_the_smallest() -> None:
    placement = Placement(
        (DeviceAllocation("gpu0", 6 * GIB, 24 * GIB, 0), DeviceAllocation("gpu1", 40 * GIB, 80 * GIB, 1))
    )
    assert placement.share == 0.25


def test_a_soft_share_shrinks_to_what_others_leave_a_hard_one_does_not() -> None:
    world = World(gpus(24), {"soft": whole(8), "hard": part(0.9)})
    world.scheduler.update_foreign({"gpu0": 10 * GIB})
    (device,) = world.load("soft").devices
    assert 13 * GIB < device.size < 14 * GIB
    (refusal,) = world.ask("hard")
    assert isinstance(refusal, Refuse)
    assert "other programs hold 10.0 GiB of gpu0" in refusal.message
    assert refusal.retry_after == 10
    world.scheduler.update_foreign({})
    world.now += 10
    assert world.ask("hard") == [Stop("i1")]


def test_gpus_that_a_model_may_use_are_the_only_ones() -> None:
    facts = ModelFacts(need=Need("gpu", 5 * GIB, 1, 0.9, gpus=(1,)))
    world = World(gpus(24, 24), {"a": facts, "b": facts, "lost": ModelFacts(need=Need("gpu", GIB, gpus=(7,)))})
    assert seats(world.load("a")) == ["gpu1"]
    assert world.ask("b") == [Stop("i1")]
    (refusal,) = world.ask("lost")
    assert isinstance(refusal, Refuse)


@pytest.mark.parametrize(
    ("devices", "facts", "message"),
    [
        (gpus(24), whole(40), "a GPU with up to 90% free, at least 40.0 GiB, but there is 24.0 GiB"),
        (gpus(24, 80), whole(30, 2), "2 GPUs, each with up to 90% free, at least 30.0 GiB, but there are 24.0 GiB, 80"),
        (gpus(24), part(0.3, 8), "a GPU with 30% free, at least 8.0 GiB, but there is 24.0 GiB"),
        ([ram(16)], whole(8), "but there is no GPU"),
        ([ram(16)], in_ram(20), "it needs 20.0 GiB of RAM, but there is 16.0 GiB of RAM for models"),
    ],
)
def test_what_can_never_fit_is_refused_at_once_with_the_arithmetic(
    devices: list[Device], facts: ModelFacts, message: str
) -> None:
    world = World(devices, {"a": facts})
    (refusal,) = world.ask("a")
    assert isinstance(refusal, Refuse)
    assert message in refusal.message
    assert world.scheduler.models["a"].state is ModelState.FAILED
    assert world.scheduler.next_tick(world.now) is None
    assert world.explain("a").verdict == "never"
    assert message in world.explain("a").message


def test_one_start_at_a_time_where_one_measures() -> None:
    world = World(gpus(80, 80), {"a": part(0.3), "b": part(0.3), "c": whole(60)})
    (first,) = world.ask("a")
    assert isinstance(first, Start)
    assert world.ask("b") == []
    assert world.scheduler.models["b"].allocation is None
    (elsewhere,) = world.ask("c")
    assert isinstance(elsewhere, Start)
    assert seats(elsewhere.placement) != seats(first.placement)
    grant, second = world.ready("a")
    assert isinstance(grant, Grant)
    assert isinstance(second, Start)
    assert seats(second.placement) == seats(first.placement)


def test_a_start_that_measures_nothing_waits_for_none() -> None:
    world = World([ram(32)], {"a": in_ram(5), "b": in_ram(5)})
    assert [type(decision) for name in "ab" for decision in world.ask(name)] == [Start, Start]


def test_ram_is_shared_by_size_not_by_count() -> None:
    world = World([ram(16)], {"a": in_ram(6), "b": in_ram(6), "c": in_ram(3), "d": in_ram(7)})
    for name in "abc":
        world.load(name)
    world.ask("a")
    assert world.ask("d") == [Stop(world.instance("b"))], "c alone would not be enough, and a is in use"
    (start,) = world.stopped("b")
    assert isinstance(start, Start)
    assert start.model == "d"


def test_places_count_as_well_as_memory() -> None:
    world = World([ram(64)], {"a": in_ram(1), "b": in_ram(1)}, max_loaded=1)
    world.load("a")
    assert world.ask("b") == [Stop("i1")]


def test_memory_on_its_way_out_is_not_given_twice() -> None:
    world = World(gpus(24), {"a": whole(), "b": whole(), "c": whole()})
    world.load("a")
    assert world.ask("b") == [Stop("i1")]
    assert world.ask("c") == []
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.model == "b"


def test_room_that_is_made_for_one_is_not_taken_by_a_smaller_one_that_came_later() -> None:
    world = World(gpus(24), {"a": part(0.5), "large": whole(), "small": part(0.4)})
    world.load("a")
    assert world.ask("large") == [Stop("i1")]
    assert world.ask("small") == []
    (start,) = world.stopped("a")
    assert isinstance(start, Start)
    assert start.model == "large"


# ── sleep ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sleepers(**policy: float) -> World:
    facts = part(0.9, 10, sleeps=True)
    policy = {"sleep_timeout": 10, "deep_sleep_timeout": 60, "sleep_bytes": 16 * GIB, **policy}
    return World([*gpus(24), ram(64)], {"a": facts, "b": facts, "c": facts}, **policy)


def test_idleness_leads_to_sleep_deeper_sleep_and_the_end() -> None:
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


def test_a_sleeper_wakes_on_demand() -> None:
    world = sleepers()
    world.load("a")
    world.tick()
    assert world.ask("a") == [], "not before it has fallen asleep"
    assert world.slept("a") == [Wake("i1", 1)]
    assert world.scheduler.models["a"].state is ModelState.STARTING
    (grant,) = world.ready("a")
    assert isinstance(grant, Grant)
    assert world.scheduler.allocations["i1"].memory == {"gpu0": int(0.9 * 24 * GIB)}


def test_sleep_makes_room_for_another_and_both_swap() -> None:
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


def test_where_a_sleeper_keeps_too_much_it_is_stopped() -> None:
    facts = ModelFacts(
        need=Need("gpu", GIB, share=0.9, measures_memory=True), sleep_footprint=SleepFootprint(4 * GIB, GIB)
    )
    world = World([*gpus(24), ram(64)], {"a": facts, "b": facts})
    world.load("a")
    assert world.ask("b") == [Stop("i1")]


def test_no_room_to_wake_on_its_own_device_makes_others_go() -> None:
    world = World(
        [*gpus(48), ram(64)], {"a": part(0.5, 10, sleeps=True), "b": part(0.9, 10)}, sleep_timeout=5, sleep_bytes=0
    )
    world.load("a")
    assert world.tick() == [Sleep("i1", 2)]
    world.slept("a")
    world.load("b")
    assert world.ask("a") == [Stop("i2")]
    assert world.stopped("b") == [Wake("i1", 2)]


def test_a_sleeper_that_has_no_room_to_sleep_deeper_ends() -> None:
    world = World([*gpus(48), ram(64)], {"a": part(0.5, 10, sleeps=True), "b": part(0.9)}, sleep_bytes=16 * GIB)
    world.load("a")
    assert world.ask("b") == [Sleep("i1", 1)]
    world.slept("a")
    world.ready("b")
    world.scheduler.policy = replace(world.scheduler.policy, deep_sleep_timeout=10)
    assert world.tick() == [Stop("i1")]


def test_a_sleeper_whose_device_others_have_filled_ends_and_its_requests_are_told() -> None:
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


def test_what_does_not_sleep_as_told_is_stopped_and_does_not_sleep_again() -> None:
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


def test_what_does_not_wake_is_loaded_anew_and_its_requests_wait() -> None:
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


def test_a_model_that_cannot_sleep_goes_straight_to_its_end() -> None:
    world = sleepers()
    world.scheduler.update_facts("a", replace(part(0.9, 10), slots=FEW_SLOTS))
    world.load("a")
    assert world.tick() == [Stop("i1")]
    assert world.now == 1000 + 2


def test_an_adopted_instance_keeps_its_place_and_can_sleep() -> None:
    world = World([*gpus(24), ram(64)], {"a": part(0.9, 10)}, sleep_timeout=10, sleep_bytes=16 * GIB)
    placement = Placement((DeviceAllocation("gpu0", 20 * GIB, 24 * GIB, 0),))
    world.scheduler.adopt("old", "a", 0, placement)
    world.scheduler.update_facts("a", part(0.9, 10, sleeps=True))
    assert world.scheduler.allocations["old"].memory == {"gpu0": 20 * GIB}
    assert world.tick() == [Sleep("old", 1)]


def test_an_unload_order_ends_a_sleeper() -> None:
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


# ── explanations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_explanations_follow_what_would_happen() -> None:
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
    told = world.explain("b")
    assert told.verdict == "after_evicting"
    gpu, memory = told.devices
    assert (gpu.total, gpu.foreign, gpu.taken, gpu.free) == (24 * GIB, 2 * GIB, {"a": 12 * GIB}, 10 * GIB)
    assert (memory.foreign, memory.free) == (8 * GIB, 56 * GIB)
    world.scheduler.update_foreign({"gpu0": 20 * GIB})
    assert world.explain("b").verdict == "not_now"


def test_what_is_leaving_is_waited_for() -> None:
    world = World(gpus(24), {"a": whole(), "b": whole()})
    world.load("a")
    world.ask("b")
    assert world.explain("b").verdict == "after_waiting"
