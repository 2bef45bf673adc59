"""Decides which model is loaded and where, who waits, sleeps and must go. Pure: events and the time in, decisions out.

The manager calls it on its one task and carries the decisions out, in order. Rules: one load however many wait; no
instance that has grants outstanding is stopped, it drains first; an instance starts where its memory and a place are
free; else the fewest others make room, sleepers and idle ones first, the least recently used, preloaded ones last; a
busy model that others wait for takes no new work after `max_wait_time`, once it has served who had waited for it; what
is pinned neither makes room nor goes when it is idle; what can never fit is refused with the arithmetic; every waiter
is granted, done or refused in the end.

An instance has places. Who finds none, or finds others waiting, is queued (`fair_queue.py`); `turns.py` tells whether
a free place is for a request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import NO_PLACEMENT, ModelFacts, Placement
from llm_api_server.ipc.lease_messages import NO_CLAIM, Claim, EndedRequest
from llm_api_server.manager.scheduling import concurrency, eviction, idle, pins, refusals
from llm_api_server.manager.scheduling.fair_queue import Waiter
from llm_api_server.manager.scheduling.memory import MemoryBudget
from llm_api_server.manager.scheduling.placement import PlacementPass
from llm_api_server.manager.scheduling.state import (
    Allocation,
    Decision,
    Done,
    Failure,
    Grant,
    Model,
    Policy,
    Revoke,
    Sleep,
    Start,
    Stop,
    Wake,
    Why,
)
from llm_api_server.types import ModelState

#: Workers have this long to report what is in flight on an adopted instance before it may be evicted.
_ADOPTION_TIME = 5.0


class Scheduler:
    """Every method takes the current time in seconds and returns what to do, in order."""

    def __init__(
        self, policy: Policy, models: list[Model], new_id: Callable[[], str], devices: Sequence[Device] = ()
    ) -> None:
        """Without `devices`, only places count."""
        self.policy = policy
        self.models = {model.name: model for model in models}
        self._new_id = new_id
        self.devices = devices
        self.device_ids = {device.id for device in devices}
        self.foreign: Mapping[str, int] = {}
        self._bookings: dict[str, Allocation] = {}
        self._is_shut_down = False

    # ── what is known of models and devices ──────────────────────────────────────────────────────────────────────

    def know(self, name: str, facts: ModelFacts) -> None:
        """What the model's files tell now; counts from its next start. An adopted instance learns that it can sleep."""
        model = self.models[name]
        model.learn(facts, counts_memory=bool(self.devices))
        if model.booking is not None and model.booking.asleep is None:
            model.booking.asleep = facts.sleep_footprint

    def observe(self, foreign: Mapping[str, int]) -> None:
        """Bytes of each device that other programs hold now."""
        self.foreign = foreign

    @property
    def bookings(self) -> Mapping[str, Allocation]:
        """By instance."""
        return self._bookings

    # ── requests and commands ────────────────────────────────────────────────────────────────────────────────────

    def acquire(self, waiter: int, name: str, now: float, claim: Claim = NO_CLAIM) -> list[Decision]:
        """A request wants `name`: granted at once, queued, or refused."""
        model = self.models[name]
        if self._is_shut_down:
            return [refusals.shutting_down(waiter)]
        model.queue.note(claim, now)
        booking = model.booking
        if booking is not None and booking.state is ModelState.READY:
            if claim.is_light or (not model.queue and concurrency.may_begin(booking, model, claim, now)):
                return [self._grant(booking, waiter, claim, now)]
        elif booking is None and (failure := model.failure) is not None and now < failure.retry_at:
            return [refusals.failed(waiter, model, failure, now)]
        elif self.policy.rejects_loading:
            return [refusals.loading(waiter, model, now), *self.load(waiter, name, now)]
        if (refusal := refusals.full(waiter, model, self.models.values(), self.policy, claim)) is not None:
            return [refusal]
        model.queue.add(Waiter(waiter, now, claim))
        if booking is None or booking.state is not ModelState.READY:
            return list(self._schedule(now))
        return [*self._reclaim(booking), *self._grant_waiting(booking, now), *self._schedule(now)]

    def cancel(self, waiter: int, name: str, now: float) -> list[Decision]:
        """The request left the queue. A load it began goes on: it belongs to the server."""
        model = self.models[name]
        model.queue.remove(waiter)
        model.load_waiters.pop(waiter, None)
        if waiter in model.stop_waiters:
            model.stop_waiters.remove(waiter)
        return list(self._schedule(now))

    def release(self, instance_id: str, places: int, now: float, ended: Sequence[EndedRequest] = ()) -> list[Decision]:
        """A worker gives back `places`. Unknown instances are ignored: they died meanwhile."""
        booking = self._bookings.get(instance_id)
        if booking is None:
            return []
        booking.grants = max(0, booking.grants - places)
        booking.last_used = now
        concurrency.end(booking, self.models[booking.model], ended)
        decisions: list[Decision] = []
        if booking.state is ModelState.READY:
            decisions += self._grant_waiting(booking, now)
        elif booking.state is ModelState.DRAINING and booking.why is not None and booking.grants == 0:
            decisions.append(self._leave(booking))
        return [*decisions, *self._schedule(now)]

    def on_read(self, instance_id: str, waiter: int, now: float) -> list[Decision]:
        """The request has its first token, or is over."""
        booking = self._bookings.get(instance_id)
        if booking is None or booking.reading.pop(waiter, None) is None or booking.state is not ModelState.READY:
            return []
        return list(self._grant_waiting(booking, now))

    def load(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: `Done` when ready, `Refuse` when the load fails. An earlier failure does not hold it back."""
        model = self.models[name]
        if model.booking is None:
            model.failure = None
        if model.state is ModelState.READY:
            return [Done(waiter)]
        if self._is_shut_down:
            return [refusals.shutting_down(waiter)]
        model.load_waiters[waiter] = now
        return list(self._schedule(now))

    def unload(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: drain and stop; `Done` when the instance is gone. A preload is not begun again by itself."""
        model = self.models[name]
        model.wanted_since = None
        self._unpin(model)
        if model.booking is None:
            model.failure = None
            return [Done(waiter)]
        model.stop_waiters.append(waiter)
        return [*self._drain(model.booking, Why.ORDER), *self._schedule(now)]

    def pin(self, name: str, now: float) -> list[Decision]:
        """It stays until it is unpinned or unloaded. One that drains for another's sake goes on."""
        self.models[name].is_pinned = True
        return list(self._schedule(now))

    def unpin(self, name: str, now: float) -> list[Decision]:
        self._unpin(self.models[name])
        return list(self._schedule(now))

    def _unpin(self, model: Model) -> None:
        model.is_pinned = False
        pins.forget_refusals(self.models.values())

    def preload(self, now: float) -> list[Decision]:
        """Start what is to be loaded from the beginning."""
        for model in self.models.values():
            if model.preload and model.booking is None:
                model.wanted_since = now
        return list(self._schedule(now))

    def configure(
        self, policy: Policy, models: Sequence[Model], changed: Collection[str], now: float
    ) -> list[Decision]:
        """From now on there are `models`; those that are `changed` start anew once their requests are done."""
        self.policy = policy
        wanted = {model.name: model for model in models}
        decisions: list[Decision] = []
        for gone in self.models.keys() - wanted.keys():
            decisions += self._forget(self.models[gone])
        for name, new in wanted.items():
            model = self.models.setdefault(name, new)
            is_changed = name in changed or model.is_gone
            model.is_gone = False
            model.unload_timeout, model.preload, model.takes_place = new.unload_timeout, new.preload, new.takes_place
            if is_changed:
                model.failure, model.refuses_sleep = None, False
                model.need, model.asleep, model.places = new.need, new.asleep, new.places
            if is_changed and model.booking is not None and not model.booking.is_leaving:
                model.wanted_since = now
                decisions += self._drain(model.booking, Why.ORDER)
            elif model.preload and model.booking is None:
                model.wanted_since = now
        return [*decisions, *self._schedule(now)]

    def _forget(self, model: Model) -> Iterator[Decision]:
        """Nobody waits for it any more, and it goes when its requests are done."""
        model.is_gone, model.wanted_since = True, None
        yield from [refusals.gone(waiter, model.name) for waiter in (*model.queue.clear(), *model.load_waiters)]
        model.load_waiters.clear()
        if model.booking is None:
            del self.models[model.name]
        else:
            yield from self._drain(model.booking, Why.ORDER)

    def shut_down(self) -> list[Decision]:
        """Refuse all who wait, stop all instances, whatever is in flight."""
        self._is_shut_down = True
        decisions: list[Decision] = []
        for model in self.models.values():
            model.wanted_since = None
            decisions += [refusals.shutting_down(waiter) for waiter in (*model.queue.clear(), *model.load_waiters)]
            model.load_waiters.clear()
        running = [one for one in self._bookings.values() if one.state is not ModelState.STOPPING]
        return [*decisions, *(self._stop(instance) for instance in running)]

    # ── what happens to instances ────────────────────────────────────────────────────────────────────────────────

    def adopt(
        self, instance_id: str, name: str, now: float, placement: Placement = NO_PLACEMENT, *, is_pinned: bool = False
    ) -> None:
        """An engine of an earlier manager serves on. Its grants come with `restore`."""
        model = self.models[name]
        model.is_pinned = is_pinned
        booking = Allocation(instance_id, name, ModelState.READY, now, now, now + _ADOPTION_TIME, now)
        booking.placement, booking.asleep = placement, model.asleep
        self._bookings[instance_id] = model.booking = booking

    def restore(self, instance_id: str, grants: int) -> None:
        """A worker that came back to a new manager still has so many requests in flight there."""
        if booking := self._bookings.get(instance_id):
            booking.grants += grants

    def is_reclaimed(self, instance_id: str) -> bool:
        """Whether a worker that has places there must be told to give them back."""
        booking = self._bookings.get(instance_id)
        return booking is not None and (booking.is_reclaimed or booking.state is ModelState.DRAINING)

    def on_ready(self, instance_id: str, now: float) -> list[Decision]:
        """The instance answers: all who wait for its model are served. Ignored when it is being stopped."""
        booking = self._bookings.get(instance_id)
        if booking is None or booking.state is not ModelState.STARTING:
            return []
        model = self.models[booking.model]
        if booking.is_loading:
            model.load_seconds = now - booking.started_at
        booking.state, booking.sleep_level = ModelState.READY, 0
        booking.ready_at = booking.last_used = now
        booking.evictable_at = now + self.policy.min_loaded_time
        model.wanted_since = None
        done = [Done(waiter) for waiter in model.load_waiters]
        model.load_waiters.clear()
        return [*done, *self._grant_waiting(booking, now), *self._schedule(now)]

    def on_slept(self, instance_id: str, now: float) -> list[Decision]:
        """Its device memory was seen free."""
        booking = self._bookings.get(instance_id)
        if booking is None or booking.state is not ModelState.SLEEPING:
            return []
        booking.is_settled = True
        self.models[booking.model].left_at = now
        return list(self._schedule(now))

    def on_sleep_failed(self, instance_id: str, now: float) -> list[Decision]:
        """It did not fall asleep or wake up as told: it is stopped, and its model does not sleep any more."""
        booking = self._bookings.get(instance_id)
        if booking is None or booking.state is ModelState.STOPPING:
            return []
        self.models[booking.model].refuses_sleep = True
        return [self._stop(booking), *self._schedule(now)]

    def on_dying(self, instance_id: str) -> None:
        """It has ended by itself; `on_exited` follows when its memory was seen free. Nobody is sent there any more."""
        booking = self._bookings.get(instance_id)
        if booking is not None and booking.state is ModelState.READY:
            booking.state, booking.why = ModelState.DRAINING, None

    def on_exited(self, instance_id: str, reason: str, now: float) -> list[Decision]:
        """The process ended by itself, loading or loaded. Who waits for a load that failed is refused with `reason`."""
        booking = self._bookings.get(instance_id)
        if booking is None:
            return []
        if booking.state is ModelState.STOPPING:
            return self.on_stopped(instance_id, now)
        model = self.models[booking.model]
        model.failure = refusals.next_failure(model.failure, booking, reason, now)
        if model.preload and booking.why is not Why.ORDER:
            model.wanted_since = now
        decisions = self._remove(booking)
        if booking.is_loading or now < model.failure.retry_at:
            decisions += refusals.failed_all(model, model.failure, now)
        return [*decisions, *self._schedule(now)]

    def on_stopped(self, instance_id: str, now: float) -> list[Decision]:
        """The process that was told to stop is gone and its room is free."""
        booking = self._bookings.get(instance_id)
        if booking is None:
            return []
        model = self.models[booking.model]
        model.failure, model.left_at = None, now
        return [*self._remove(booking), *self._schedule(now)]

    def mark_failed(self, name: str, reason: str, now: float) -> None:
        """Known before any load (a missing file): shown, and tried again on the next request."""
        if self.models[name].booking is None:
            self.models[name].failure = Failure(reason, now, 0)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now: float) -> list[Decision]:
        """Put to sleep or unload what was idle for too long, and do what waited for its time."""
        due = [(booking, level) for booking, level, at in self._idle_ends() if at <= now]
        decisions = [self._end_idleness(booking, level) for booking, level in due]
        for booking in [booking for booking in self._bookings.values() if booking.state is ModelState.READY]:
            decisions += self._grant_waiting(booking, now)
        return [*decisions, *self._schedule(now)]

    def next_tick(self, now: float) -> float | None:
        """When `tick` has something to do if nothing happens before, or None."""
        ends = [at for _, _, at in self._idle_ends()]
        if any(at <= now for at in ends):
            return now
        waiting = self.waiting()
        times = ends + [model.startable_at for model in waiting]
        queued = [b for b in self._bookings.values() if self.models[b.model].queue]
        times += [at for b in queued if (at := concurrency.next_end_of_reading(b, now)) is not None]
        if any(model.startable_at <= now for model in waiting) or self.room().later.places < 0:
            times += eviction.times(self._bookings.values(), waiting, self.models, self.policy, now)
        return min((at for at in times if at > now), default=None)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _idle_ends(self) -> Iterator[tuple[Allocation, int, float]]:
        return idle.ends(self._bookings.values(), self.models, self.policy)

    def waiting(self) -> list[Model]:
        """Models that somebody waits for and that nothing is done for yet, the longest wait first."""
        waiting = [
            (since, model)
            for model in self.models.values()
            if (model.booking is None or model.booking.is_asleep) and (since := model.wanted_at()) is not None
        ]
        return [model for _, model in sorted(waiting, key=lambda pair: pair[0])]

    def positions(self, now: float) -> dict[int, int]:
        """Of all who are queued, each in the queue of its model, from 1."""
        queues = (model.queue for model in self.models.values() if model.queue)
        return {waiter: position for queue in queues for waiter, position in queue.positions(now).items()}

    def room(self) -> PlacementPass:
        """As it is now."""
        return PlacementPass(self.empty(self.policy.max_loaded), self._bookings.values(), self.models)

    def candidates(self, model: Model, now: float, *, may_be_busy: bool) -> list[Allocation]:
        """What may make room for `model`, the best to go first."""
        bookings = self._bookings.values()
        return eviction.candidates(model, bookings, self.models, self.policy, now, may_be_busy=may_be_busy)

    def _schedule(self, now: float) -> Iterator[Decision]:
        """Start what is waited for, oldest first, and make room for requests that find none."""
        if self._is_shut_down:
            return
        room = self.room()
        for model in self.waiting():
            if model.startable_at <= now:
                yield from self._serve(model, room, now)
        yield from self._bring_down(room, now)
        for booking in list(self._bookings.values()):
            if booking.drains_for_room and booking.id not in room.victims:
                booking.state, booking.why = ModelState.READY, None
                yield from self._grant_waiting(booking, now)

    def _bring_down(self, room: PlacementPass, now: float) -> Iterator[Decision]:
        """More instances were adopted than there are places."""
        others = [booking for booking in self._bookings.values() if booking.id not in room.victims]
        for booking in eviction.surplus(others, self.models, max(0, -room.later.places), now):
            yield self._stop(booking)

    def _serve(self, model: Model, room: PlacementPass, now: float) -> Iterator[Decision]:
        if (failure := refusals.impossible(model, self.empty(1), now)) is not None:
            yield from self._give_up(model, failure, now)
        elif (placement := room.seats_now(model)) is not None:
            is_blocked = room.is_blocked(model, placement)
            room.give(model, placement, at_once=True)
            if not is_blocked:
                yield self._start(model, placement, now)
                room.begin(model)
        elif (placement := room.seats_later(model)) is not None:
            room.give(model, placement, at_once=False)
        elif model.is_waited_for:  # a preload that nobody waits for must not push out what is in use
            since = model.waited_for_since()
            waits_for_long = since is not None and now - since >= self.policy.max_wait_time
            made = room.make(model, self.candidates(model, now, may_be_busy=waits_for_long))
            if made is not None:
                room.evict(made)
                room.give(model, made.placement, at_once=False)
                for victim in made.victims:
                    yield from self._drain(victim, Why.ROOM, may_sleep=made.may_sleep)
            elif (reason := self.why_pins_block(model)) is not None:
                model.failure = Failure(reason, now, 0, is_by_pins=True)
                yield from refusals.failed_all(model, model.failure, now)

    def why_pins_block(self, model: Model) -> str | None:
        return pins.why_blocked(model, self.empty(self.policy.max_loaded), self._bookings.values(), self.models)

    def _give_up(self, model: Model, failure: Failure, now: float) -> Iterator[Decision]:
        if failure.retry_at <= now:
            model.wanted_since = None
        model.failure = failure
        if model.booking is not None:
            yield self._stop(model.booking)
        yield from refusals.failed_all(model, failure, now)

    def empty(self, places: int) -> MemoryBudget:
        """With nothing of ours on the devices."""
        return MemoryBudget(self.devices, self.foreign, places)

    def _start(self, model: Model, placement: Placement, now: float) -> Decision:
        """Start or wake it."""
        booking = model.booking
        if booking is not None:
            booking.state, booking.is_settled = ModelState.STARTING, False
            return Wake(booking.id, booking.sleep_level)
        booking = Allocation(self._new_id(), model.name, started_at=now, last_used=now, placement=placement)
        booking.asleep = model.asleep
        self._bookings[booking.id] = model.booking = booking
        return Start(booking.id, model.name, placement)

    def _drain(self, booking: Allocation, why: Why, *, may_sleep: bool = False) -> Iterator[Decision]:
        if booking.state is ModelState.STOPPING:
            return
        booking.why, booking.may_sleep = why, may_sleep
        if booking.state is ModelState.READY and booking.grants > 0:
            booking.state = ModelState.DRAINING
            booking.is_reclaimed = True
            yield Revoke(booking.id)
        elif booking.state is not ModelState.DRAINING:
            yield self._leave(booking)

    def _leave(self, booking: Allocation) -> Decision:
        """What drained goes to sleep or ends."""
        is_awake = booking.state in {ModelState.READY, ModelState.DRAINING}
        may_sleep = booking.why is Why.ROOM and booking.may_sleep and is_awake
        if may_sleep and idle.can_sleep(booking, self.models[booking.model]):
            return self._sleep(booking, self._sleep_level(booking))
        return self._stop(booking)

    def _stop(self, booking: Allocation) -> Stop:
        booking.state = ModelState.STOPPING
        return Stop(booking.id)

    def _sleep(self, booking: Allocation, level: int) -> Sleep:
        from_level, booking.sleep_level = booking.sleep_level, level
        booking.state, booking.why, booking.is_settled = ModelState.SLEEPING, None, False
        return Sleep(booking.id, level, from_level)

    def _sleep_level(self, booking: Allocation) -> int:
        later = self.room().later
        return idle.sleep_level(booking, self._bookings.values(), self.policy, self.devices, later)

    def _end_idleness(self, booking: Allocation, level: int) -> Decision:
        """Level 0: stop it. To sleep deeper, a sleeper has to wake: it needs its memory once more."""
        if level == 0:
            return self._stop(booking)
        if not booking.is_asleep:
            return self._sleep(booking, self._sleep_level(booking))
        model = self.models[booking.model]
        return self._sleep(booking, level) if self.room().seats_now(model) is not None else self._stop(booking)

    def _remove(self, booking: Allocation) -> list[Decision]:
        del self._bookings[booking.id]
        model = self.models[booking.model]
        model.booking = None
        done: list[Decision] = [Done(waiter) for waiter in model.stop_waiters]
        model.stop_waiters.clear()
        if model.is_gone:
            del self.models[model.name]
        return done

    def _grant(self, booking: Allocation, waiter: int, claim: Claim, now: float) -> Grant:
        booking.last_used = now
        places, keeps = concurrency.begin(booking, self.models[booking.model], waiter, claim, now)
        return Grant(waiter, booking.id, places, keeps, claim.key_id)

    def _grant_waiting(self, booking: Allocation, now: float) -> Iterator[Decision]:
        """Those whose turn it is, while there are places."""
        model = self.models[booking.model]
        while (
            turn := model.queue.pop(now, lambda claim: concurrency.may_begin(booking, model, claim, now))
        ) is not None:
            yield self._grant(booking, turn.id, turn.claim, now)

    def _reclaim(self, booking: Allocation) -> Iterator[Decision]:
        """Workers may have places that others now wait for."""
        if not booking.is_reclaimed:
            booking.is_reclaimed = True
            yield Revoke(booking.id)
