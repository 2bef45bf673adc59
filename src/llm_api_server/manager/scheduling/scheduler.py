"""Decides which model is loaded and where, which requests wait, and which instances sleep or end. Pure.

Events and the time go in, decisions come out, to be carried out in order. The rules:

- One load serves all requests that wait for the model.
- An instance with slots in use is never stopped; it drains first.
- A model starts where memory is free and `max_loaded` allows it. Otherwise the fewest others are evicted: sleeping and
  idle ones first, the least recently used, preloaded ones last.
- A busy model that others wait for drains after `max_wait_time`, once it has served the requests that waited for it.
- A pinned model is neither evicted nor unloaded when idle.
- A model that can never fit is refused with the arithmetic.
- Every waiter is granted, done or refused in the end.

A request that finds no free slot, or finds others waiting, is queued (`fair_queue.py`); `concurrency.py` decides
whether a free slot is for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import NO_PLACEMENT, ModelFacts, Placement
from llm_api_server.ipc.lease_messages import NO_CLAIM, Claim, EndedRequest
from llm_api_server.manager.scheduling import concurrency, eviction, idle, refusals
from llm_api_server.manager.scheduling.decisions import Decision, Done, Grant, Revoke, Sleep, Start, Stop, Wake
from llm_api_server.manager.scheduling.fair_queue import Waiter
from llm_api_server.manager.scheduling.memory import MemoryBudget
from llm_api_server.manager.scheduling.placement import PlacementPass
from llm_api_server.manager.scheduling.state import Allocation, DrainReason, Failure, Model, Policy
from llm_api_server.types import ModelState

#: Seconds that workers have to report their requests on an adopted instance before it may be evicted.
_ADOPTION_TIME = 5.0


class Scheduler:
    """Takes the current time in seconds with every event, and returns the decisions in order."""

    def __init__(
        self, policy: Policy, models: list[Model], new_id: Callable[[], str], devices: Sequence[Device] = ()
    ) -> None:
        """Count memory only if there are `devices`."""
        self.policy = policy
        self.models = {model.name: model for model in models}
        self.devices = devices
        self.device_ids = {device.id for device in devices}
        self.foreign: Mapping[str, int] = {}
        self._new_id = new_id
        self._allocations: dict[str, Allocation] = {}
        self._is_shut_down = False

    # ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def allocations(self) -> Mapping[str, Allocation]:
        """The allocations, by instance."""
        return self._allocations

    def update_facts(self, name: str, facts: ModelFacts) -> None:
        """Apply the facts from the model's files to its next start; an adopted instance becomes able to sleep."""
        model = self.models[name]
        model.update_facts(facts, counts_memory=bool(self.devices))
        if model.allocation is not None and model.allocation.sleep_footprint is None:
            model.allocation.sleep_footprint = facts.sleep_footprint

    def update_foreign(self, foreign: Mapping[str, int]) -> None:
        """Set the bytes of each device that other programs hold."""
        self.foreign = foreign

    # ── requests and commands ────────────────────────────────────────────────────────────────────────────────────

    def acquire(self, waiter: int, name: str, now: float, claim: Claim = NO_CLAIM) -> list[Decision]:
        """Grant a request a slot on `name`, queue it, or refuse it."""
        model = self.models[name]
        if self._is_shut_down:
            return [refusals.shutting_down(waiter)]
        model.queue.mark_active(claim.key_id, now)
        allocation = model.allocation
        if allocation is not None and allocation.state is ModelState.READY:
            if claim.is_light or (not model.queue and concurrency.may_start(allocation, model, claim, now)):
                return [self._grant(allocation, waiter, claim, now)]
        elif allocation is None and (failure := model.failure) is not None and now < failure.retry_at:
            return [refusals.load_failed(waiter, model, failure, now)]
        elif self.policy.rejects_loading:
            return [refusals.model_loading(waiter, model, now), *self.load(waiter, name, now)]
        if (refusal := refusals.queue_full(waiter, model, self.models.values(), self.policy, claim)) is not None:
            return [refusal]
        model.queue.add(Waiter(waiter, now, claim))
        if allocation is None or allocation.state is not ModelState.READY:
            return list(self._schedule(now))
        return [*self._revoke(allocation), *self._grant_queued(allocation, now), *self._schedule(now)]

    def cancel(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Remove a request or command that waits. A load that it began goes on."""
        model = self.models[name]
        model.queue.remove(waiter)
        model.load_waiters.pop(waiter, None)
        if waiter in model.unload_waiters:
            model.unload_waiters.remove(waiter)
        return list(self._schedule(now))

    def return_slots(
        self, instance_id: str, slots: int, now: float, ended: Sequence[EndedRequest] = ()
    ) -> list[Decision]:
        """Take back slots of a worker. Unknown instances are ignored: they ended meanwhile."""
        allocation = self._allocations.get(instance_id)
        if allocation is None:
            return []
        allocation.held_slots = max(0, allocation.held_slots - slots)
        allocation.last_used = now
        concurrency.end_requests(allocation, self.models[allocation.model], ended)
        decisions: list[Decision] = []
        if allocation.state is ModelState.READY:
            decisions += self._grant_queued(allocation, now)
        elif self._has_drained(allocation):
            decisions.append(self._leave(allocation))
        return [*decisions, *self._schedule(now)]

    def on_prefill_done(self, instance_id: str, waiter: int, now: float) -> list[Decision]:
        """Admit another prompt: the request has its first token, or has ended."""
        allocation = self._allocations.get(instance_id)
        if allocation is None or allocation.prefilling.pop(waiter, None) is None:
            return []
        return list(self._grant_queued(allocation, now)) if allocation.state is ModelState.READY else []

    def load(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: `Done` once it is ready, `Refuse` if the load fails. Ignores the back-off of an earlier failure."""
        model = self.models[name]
        if model.allocation is None:
            model.failure = None
        if model.state is ModelState.READY:
            return [Done(waiter)]
        if self._is_shut_down:
            return [refusals.shutting_down(waiter)]
        model.load_waiters[waiter] = now
        return list(self._schedule(now))

    def unload(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: drain, unpin and stop; `Done` once the instance is gone. A preload does not start again."""
        model = self.models[name]
        model.preload_due_since = None
        self._unpin(model)
        if model.allocation is None:
            model.failure = None
            return [Done(waiter)]
        model.unload_waiters.append(waiter)
        return [*self._drain(model.allocation, DrainReason.COMMAND), *self._schedule(now)]

    def pin(self, name: str, now: float) -> list[Decision]:
        """Command: keep the model until it is unpinned or unloaded. Calls off its eviction."""
        self.models[name].is_pinned = True
        return list(self._schedule(now))

    def unpin(self, name: str, now: float) -> list[Decision]:
        self._unpin(self.models[name])
        return list(self._schedule(now))

    def _unpin(self, model: Model) -> None:
        model.is_pinned = False
        for other in self.models.values():
            if other.failure is not None and other.failure.is_caused_by_pins:
                other.failure = None

    def preload(self, now: float) -> list[Decision]:
        """Start the preloaded models."""
        for model in self.models.values():
            if model.preload and model.allocation is None:
                model.preload_due_since = now
        return list(self._schedule(now))

    def configure(
        self, policy: Policy, models: Sequence[Model], changed: Collection[str], now: float
    ) -> list[Decision]:
        """Follow another configuration. The instances of `changed` models restart once their requests have ended."""
        self.policy = policy
        wanted = {model.name: model for model in models}
        decisions: list[Decision] = []
        for name in self.models.keys() - wanted.keys():
            decisions += self._remove_model(self.models[name])
        for name, new in wanted.items():
            model = self.models.setdefault(name, new)
            is_changed = name in changed or model.is_removed
            model.is_removed = False
            model.unload_timeout, model.preload, model.is_local = new.unload_timeout, new.preload, new.is_local
            if is_changed:
                model.failure, model.has_failed_to_sleep = None, False
                model.need, model.sleep_footprint, model.slots = new.need, new.sleep_footprint, new.slots
            if is_changed and model.allocation is not None and not model.allocation.is_leaving:
                model.preload_due_since = now
                decisions += self._drain(model.allocation, DrainReason.COMMAND)
            elif model.preload and model.allocation is None:
                model.preload_due_since = now
        return [*decisions, *self._schedule(now)]

    def _remove_model(self, model: Model) -> Iterator[Decision]:
        """Refuse the model's waiters; its instance ends after its requests."""
        model.is_removed, model.preload_due_since = True, None
        waiters = [*model.queue.clear(), *model.load_waiters]
        model.load_waiters.clear()
        yield from [refusals.model_removed(waiter, model.name) for waiter in waiters]
        if model.allocation is None:
            del self.models[model.name]
        else:
            yield from self._drain(model.allocation, DrainReason.COMMAND)

    def shut_down(self) -> list[Decision]:
        """Refuse all waiters and stop all instances, with requests in flight or not."""
        self._is_shut_down = True
        decisions: list[Decision] = []
        for model in self.models.values():
            model.preload_due_since = None
            decisions += [refusals.shutting_down(waiter) for waiter in (*model.queue.clear(), *model.load_waiters)]
            model.load_waiters.clear()
        running = [one for one in self._allocations.values() if one.state is not ModelState.STOPPING]
        return [*decisions, *(self._stop(allocation) for allocation in running)]

    # ── events of instances ──────────────────────────────────────────────────────────────────────────────────────

    def adopt(
        self, instance_id: str, name: str, now: float, placement: Placement = NO_PLACEMENT, *, is_pinned: bool = False
    ) -> None:
        """Take over an instance of an earlier manager. `restore_slots` follows for each worker that uses it."""
        model = self.models[name]
        model.is_pinned = is_pinned
        allocation = Allocation(instance_id, name, ModelState.READY, now, now, now + _ADOPTION_TIME, now)
        allocation.placement, allocation.sleep_footprint = placement, model.sleep_footprint
        self._allocations[instance_id] = model.allocation = allocation

    def restore_slots(self, instance_id: str, slots: int) -> None:
        """Count the slots that a worker holds from an earlier manager."""
        if allocation := self._allocations.get(instance_id):
            allocation.held_slots += slots

    def is_revoked(self, instance_id: str) -> bool:
        """Return whether workers must return their slots on the instance."""
        allocation = self._allocations.get(instance_id)
        return allocation is not None and (allocation.is_revoked or allocation.state is ModelState.DRAINING)

    def on_ready(self, instance_id: str, now: float) -> list[Decision]:
        """Serve the requests that wait for an instance that has loaded or woken. Ignored while it is being stopped."""
        allocation = self._allocations.get(instance_id)
        if allocation is None or allocation.state is not ModelState.STARTING:
            return []
        model = self.models[allocation.model]
        if allocation.is_loading:
            model.load_seconds = now - allocation.started_at
        allocation.state, allocation.sleep_level = ModelState.READY, 0
        allocation.ready_at = allocation.last_used = now
        allocation.evictable_at = now + self.policy.min_loaded_time
        model.preload_due_since = None
        done = [Done(waiter) for waiter in model.load_waiters]
        model.load_waiters.clear()
        return [*done, *self._grant_queued(allocation, now), *self._schedule(now)]

    def on_slept(self, instance_id: str, now: float) -> list[Decision]:
        """Mark the memory of a sleeping instance as free, after it was measured to be."""
        allocation = self._allocations.get(instance_id)
        if allocation is None or allocation.state is not ModelState.SLEEPING:
            return []
        allocation.is_memory_freed = True
        self.models[allocation.model].freed_at = now
        return list(self._schedule(now))

    def on_sleep_failed(self, instance_id: str, now: float) -> list[Decision]:
        """Stop an instance that did not fall asleep or wake; its model sleeps no more."""
        allocation = self._allocations.get(instance_id)
        if allocation is None or allocation.state is ModelState.STOPPING:
            return []
        self.models[allocation.model].has_failed_to_sleep = True
        return [self._stop(allocation), *self._schedule(now)]

    def on_dying(self, instance_id: str) -> None:
        """Grant no more slots on an instance that ended by itself. `on_exited` follows once its memory is free."""
        allocation = self._allocations.get(instance_id)
        if allocation is not None and allocation.state is ModelState.READY:
            allocation.state, allocation.drain_reason = ModelState.DRAINING, None

    def on_exited(self, instance_id: str, reason: str, now: float) -> list[Decision]:
        """Remove an instance that ended by itself. If its load failed, its waiters are refused with `reason`."""
        allocation = self._allocations.get(instance_id)
        if allocation is None:
            return []
        if allocation.state is ModelState.STOPPING:
            return self.on_stopped(instance_id, now)
        model = self.models[allocation.model]
        model.failure = refusals.next_failure(model.failure, allocation, reason, now)
        if model.preload and allocation.drain_reason is not DrainReason.COMMAND:
            model.preload_due_since = now
        decisions = self._remove(allocation)
        if allocation.is_loading or now < model.failure.retry_at:
            decisions += refusals.load_failed_for_all(model, model.failure, now)
        return [*decisions, *self._schedule(now)]

    def on_stopped(self, instance_id: str, now: float) -> list[Decision]:
        """Remove an instance that was stopped; its memory is free for other models."""
        allocation = self._allocations.get(instance_id)
        if allocation is None:
            return []
        model = self.models[allocation.model]
        model.failure, model.freed_at = None, now
        return [*self._remove(allocation), *self._schedule(now)]

    def mark_failed(self, name: str, reason: str, now: float) -> None:
        """Show a failure that is known before any load, such as a missing file. The next request tries again."""
        if self.models[name].allocation is None:
            self.models[name].failure = Failure(reason, now, 0)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now: float) -> list[Decision]:
        """Carry out what is due: idle instances sleep or end, and waits reach their limits."""
        due = [(allocation, level) for allocation, level, at in self._idle_transitions() if at <= now]
        decisions = [self._on_idle(allocation, level) for allocation, level in due]
        for allocation in [one for one in self._allocations.values() if one.state is ModelState.READY]:
            decisions += self._grant_queued(allocation, now)
        return [*decisions, *self._schedule(now)]

    def next_tick(self, now: float) -> float | None:
        """Return when the next `tick` is due if no event comes before, or None."""
        idle_times = [at for _, _, at in self._idle_transitions()]
        if any(at <= now for at in idle_times):
            return now
        waiting = self.waiting_models()
        times = idle_times + [model.startable_at for model in waiting]
        queued = [one for one in self._allocations.values() if self.models[one.model].queue]
        times += [at for one in queued if (at := concurrency.next_prefill_end(one, now)) is not None]
        if any(model.startable_at <= now for model in waiting) or self.placement_pass().projected.models_left < 0:
            times += eviction.times(self._allocations.values(), waiting, self.models, self.policy, now)
        return min((at for at in times if at > now), default=None)

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────

    def waiting_models(self) -> list[Model]:
        """Return the models whose load is wanted and not under way, the longest wait first."""
        waiting = [
            (since, model)
            for model in self.models.values()
            if (model.allocation is None or model.allocation.is_asleep) and (since := model.wanted_since()) is not None
        ]
        return [model for _, model in sorted(waiting, key=lambda pair: pair[0])]

    def positions(self, now: float) -> dict[int, int]:
        """Return the position of each waiter in the queue of its model, from 1."""
        queues = (model.queue for model in self.models.values() if model.queue)
        return {waiter: position for queue in queues for waiter, position in queue.positions(now).items()}

    def placement_pass(self) -> PlacementPass:
        return PlacementPass(self.empty_budget(self.policy.max_loaded), self._allocations.values(), self.models)

    def empty_budget(self, models: int) -> MemoryBudget:
        """Return the memory without any instance of ours, for a number of models."""
        return MemoryBudget(self.devices, self.foreign, models)

    def eviction_candidates(self, model: Model, now: float, *, may_be_busy: bool) -> list[Allocation]:
        """Return the instances that may be evicted for `model`, best first."""
        allocations = self._allocations.values()
        return eviction.candidates(model, allocations, self.models, self.policy, now, may_be_busy=may_be_busy)

    def pinned_obstacle(self, model: Model) -> str | None:
        """Return why pinned models prevent the load of `model`, or None."""
        empty = self.empty_budget(self.policy.max_loaded)
        return eviction.pinned_obstacle(model, empty, self._allocations.values(), self.models)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _schedule(self, now: float) -> Iterator[Decision]:
        """Start the models that are waited for, the longest wait first, and evict others for them."""
        if self._is_shut_down:
            return
        placing = self.placement_pass()
        for model in self.waiting_models():
            if model.startable_at <= now:
                yield from self._serve(model, placing, now)
        yield from self._stop_surplus(placing, now)
        for allocation in list(self._allocations.values()):
            if allocation.is_draining_for_eviction and allocation.id not in placing.victims:
                allocation.state, allocation.drain_reason = ModelState.READY, None
                yield from self._grant_queued(allocation, now)

    def _stop_surplus(self, placing: PlacementPass, now: float) -> Iterator[Decision]:
        """Stop idle instances if more are loaded than `max_loaded` allows, as after an adoption."""
        others = [one for one in self._allocations.values() if one.id not in placing.victims]
        for allocation in eviction.surplus(others, self.models, max(0, -placing.projected.models_left), now):
            yield self._stop(allocation)

    def _serve(self, model: Model, placing: PlacementPass, now: float) -> Iterator[Decision]:
        """Start the model, reserve memory for it, evict others, or refuse its waiters."""
        if (failure := refusals.memory_failure(model, self.empty_budget(1), now)) is not None:
            yield from self._give_up(model, failure, now)
        elif (placement := placing.place_now(model)) is not None:
            must_wait = placing.must_wait(model, placement)
            placing.reserve(model, placement, at_once=True)
            if not must_wait:
                yield self._start(model, placement, now)
                placing.add_start(model)
        elif (placement := placing.place_later(model)) is not None:
            placing.reserve(model, placement, at_once=False)
        elif model.has_waiters:  # a preload without waiters must not evict what is in use
            yield from self._evict_for(model, placing, now)

    def _evict_for(self, model: Model, placing: PlacementPass, now: float) -> Iterator[Decision]:
        since = model.waiting_since()
        may_be_busy = since is not None and now - since >= self.policy.max_wait_time
        plan = placing.plan_eviction(model, self.eviction_candidates(model, now, may_be_busy=may_be_busy))
        if plan is not None:
            placing.evict(plan)
            placing.reserve(model, plan.placement, at_once=False)
            for victim in plan.victims:
                yield from self._drain(victim, DrainReason.EVICTION, may_sleep=plan.may_sleep)
        elif (reason := self.pinned_obstacle(model)) is not None:
            model.failure = Failure(reason, now, 0, is_caused_by_pins=True)
            yield from refusals.load_failed_for_all(model, model.failure, now)

    def _give_up(self, model: Model, failure: Failure, now: float) -> Iterator[Decision]:
        if failure.retry_at <= now:
            model.preload_due_since = None
        model.failure = failure
        if model.allocation is not None:
            yield self._stop(model.allocation)
        yield from refusals.load_failed_for_all(model, failure, now)

    def _start(self, model: Model, placement: Placement, now: float) -> Decision:
        """Start the model, or wake its instance."""
        allocation = model.allocation
        if allocation is not None:
            allocation.state, allocation.is_memory_freed = ModelState.STARTING, False
            return Wake(allocation.id, allocation.sleep_level)
        allocation = Allocation(self._new_id(), model.name, started_at=now, last_used=now, placement=placement)
        allocation.sleep_footprint = model.sleep_footprint
        self._allocations[allocation.id] = model.allocation = allocation
        return Start(allocation.id, model.name, placement)

    def _drain(self, allocation: Allocation, reason: DrainReason, *, may_sleep: bool = False) -> Iterator[Decision]:
        if allocation.state is ModelState.STOPPING:
            return
        allocation.drain_reason, allocation.may_sleep = reason, may_sleep
        if allocation.state is ModelState.READY and allocation.held_slots > 0:
            allocation.state = ModelState.DRAINING
            allocation.is_revoked = True
            yield Revoke(allocation.id)
        elif allocation.state is not ModelState.DRAINING:
            yield self._leave(allocation)

    def _has_drained(self, allocation: Allocation) -> bool:
        """Return whether a drain is over. An instance that died has no drain reason: `on_exited` follows."""
        is_draining = allocation.state is ModelState.DRAINING and allocation.drain_reason is not None
        return is_draining and allocation.held_slots == 0

    def _leave(self, allocation: Allocation) -> Decision:
        """Put a drained instance to sleep, or stop it."""
        is_awake = allocation.state in {ModelState.READY, ModelState.DRAINING}
        may_sleep = allocation.drain_reason is DrainReason.EVICTION and allocation.may_sleep and is_awake
        if may_sleep and idle.can_sleep(allocation, self.models[allocation.model]):
            return self._sleep(allocation, self._sleep_level(allocation))
        return self._stop(allocation)

    def _stop(self, allocation: Allocation) -> Stop:
        allocation.state = ModelState.STOPPING
        return Stop(allocation.id)

    def _sleep(self, allocation: Allocation, level: int) -> Sleep:
        from_level, allocation.sleep_level = allocation.sleep_level, level
        allocation.state, allocation.drain_reason, allocation.is_memory_freed = ModelState.SLEEPING, None, False
        return Sleep(allocation.id, level, from_level)

    def _sleep_level(self, allocation: Allocation) -> int:
        projected = self.placement_pass().projected
        return idle.sleep_level(allocation, self._allocations.values(), self.policy, projected)

    def _idle_transitions(self) -> Iterator[tuple[Allocation, int, float]]:
        return idle.transitions(self._allocations.values(), self.models, self.policy)

    def _on_idle(self, allocation: Allocation, level: int) -> Decision:
        """Put an idle instance to sleep, or stop it (level 0). To sleep deeper it must wake, which needs memory."""
        if level == 0:
            return self._stop(allocation)
        if not allocation.is_asleep:
            return self._sleep(allocation, self._sleep_level(allocation))
        fits = self.placement_pass().place_now(self.models[allocation.model]) is not None
        return self._sleep(allocation, level) if fits else self._stop(allocation)

    def _remove(self, allocation: Allocation) -> list[Decision]:
        del self._allocations[allocation.id]
        model = self.models[allocation.model]
        model.allocation = None
        done: list[Decision] = [Done(waiter) for waiter in model.unload_waiters]
        model.unload_waiters.clear()
        if model.is_removed:
            del self.models[model.name]
        return done

    def _grant(self, allocation: Allocation, waiter: int, claim: Claim, now: float) -> Grant:
        allocation.last_used = now
        model = self.models[allocation.model]
        slots, until_revoked = concurrency.take_slots(allocation, model, waiter, claim, now)
        return Grant(waiter, allocation.id, slots, until_revoked, claim.key_id)

    def _grant_queued(self, allocation: Allocation, now: float) -> Iterator[Decision]:
        """Grant slots to queued requests while some are free."""
        model = self.models[allocation.model]

        def may_start(claim: Claim) -> bool:
            return concurrency.may_start(allocation, model, claim, now)

        while (waiter := model.queue.pop(now, may_start)) is not None:
            yield self._grant(allocation, waiter.id, waiter.claim, now)

    def _revoke(self, allocation: Allocation) -> Iterator[Decision]:
        """Ask the workers for their free slots, because a request waits."""
        if not allocation.is_revoked:
            allocation.is_revoked = True
            yield Revoke(allocation.id)
