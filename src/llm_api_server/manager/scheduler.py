"""Decides which model is loaded, who waits and who must go. Pure: events and the time in, decisions out.

The manager calls it on its one task and carries the decisions out, in order. Rules: one load however many wait; no
instance that has grants outstanding is stopped, it drains first; an idle model makes room before a busy one, the
least recently used first, preloaded ones last; a busy model that others wait for takes no new work after
`max_wait_time`; every waiter is granted, done or refused in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from llm_api_server.types import ModelState

#: Back-off after the n-th failed load or crash in a row, in seconds.
_FIRST_BACKOFF = 2.0
_LONGEST_BACKOFF = 60.0
#: An instance that was ready this long did not crash "in a row".
_STABLE_TIME = 60.0
#: Workers have this long to report what is in flight on an adopted instance before it may be evicted.
_ADOPTION_TIME = 5.0


@dataclass(frozen=True)
class Policy:
    """Times in seconds; a model's `unload_timeout` of 0 means never."""

    max_loaded: int
    min_loaded_time: float
    max_wait_time: float


@dataclass(frozen=True)
class Start:
    instance: str
    model: str


@dataclass(frozen=True)
class Drain:
    """Tell the workers to start nothing more on it."""

    instance: str


@dataclass(frozen=True)
class Stop:
    """End the process; answered by `on_stopped` in any case."""

    instance: str


@dataclass(frozen=True)
class Grant:
    waiter: int
    instance: str


@dataclass(frozen=True)
class Done:
    """A load or unload command is fulfilled."""

    waiter: int


@dataclass(frozen=True)
class Refuse:
    waiter: int
    code: str
    message: str
    retry_after: float | None = None


Decision = Start | Drain | Stop | Grant | Done | Refuse


class _Why(Enum):
    """Why an instance drains: room for another can be taken back, an order cannot."""

    ROOM = "room"
    ORDER = "order"


@dataclass
class Instance:
    """One engine process, from the decision to start it until it is gone. `grants` counts leases over all workers."""

    id: str
    model: str
    state: ModelState = ModelState.STARTING
    started_at: float = 0.0
    ready_at: float = 0.0
    evictable_at: float = 0.0
    last_used: float = 0.0
    grants: int = 0
    why: _Why | None = None

    def is_idle(self) -> bool:
        return self.state is ModelState.READY and self.grants == 0


@dataclass(frozen=True)
class Failure:
    """Why the last load or run ended. Requests before `retry_at` are refused with `reason`."""

    reason: str
    retry_at: float
    count: int


@dataclass(frozen=True)
class _Waiter:
    """`gets_grant` is False for a load command, which only wants to hear that the model is ready."""

    id: int
    since: float
    gets_grant: bool


@dataclass
class Model:
    """One configured model. `waiters` keeps the order of arrival; `stop_waiters` wait for the instance to be gone.

    `takes_place` is False for what runs elsewhere: it neither counts against `max_loaded` nor makes room.
    """

    name: str
    unload_timeout: float
    preload: bool = False
    takes_place: bool = True
    instance: Instance | None = None
    waiters: dict[int, _Waiter] = field(default_factory=dict)
    stop_waiters: list[int] = field(default_factory=list)
    failure: Failure | None = None
    #: Since when the server itself wants it loaded (preload), or None.
    wanted_since: float | None = None

    def wanted_at(self) -> float | None:
        """Since when somebody waits for a load, or None."""
        times = [waiter.since for waiter in self.waiters.values()]
        if self.wanted_since is not None:
            times.append(self.wanted_since)
        return min(times, default=None)

    @property
    def state(self) -> ModelState:
        if self.instance is not None:
            return self.instance.state
        return ModelState.STOPPED if self.failure is None else ModelState.FAILED


class Scheduler:
    """Every method takes the current time in seconds and returns what to do, in order."""

    def __init__(self, policy: Policy, models: list[Model], new_id: Callable[[], str]) -> None:
        self.policy = policy
        self.models = {model.name: model for model in models}
        self._new_id = new_id
        self._instances: dict[str, Instance] = {}
        self._is_shut_down = False

    # ── requests and commands ────────────────────────────────────────────────────────────────────────────────────

    def acquire(self, waiter: int, name: str, now: float) -> list[Decision]:
        """A request wants `name`: granted at once, queued, or refused."""
        model = self.models[name]
        if self._is_shut_down:
            return [Refuse(waiter, "server_shutting_down", "the server is shutting down")]
        if model.instance is not None and model.instance.state is ModelState.READY:
            return [self._grant(model.instance, waiter, now)]
        failure = model.failure
        if model.instance is None and failure is not None and now < failure.retry_at:
            return [_refuse(waiter, model, failure, now)]
        model.waiters[waiter] = _Waiter(waiter, now, gets_grant=True)
        return list(self._schedule(now))

    def cancel(self, waiter: int, name: str, now: float) -> list[Decision]:
        """The request left the queue. A load it began goes on: it belongs to the server."""
        model = self.models[name]
        model.waiters.pop(waiter, None)
        if waiter in model.stop_waiters:
            model.stop_waiters.remove(waiter)
        return list(self._schedule(now))

    def release(self, instance_id: str, grants: int, now: float) -> list[Decision]:
        """A worker gives back `grants` leases. Unknown instances are ignored: they died meanwhile."""
        instance = self._instances.get(instance_id)
        if instance is None:
            return []
        instance.grants = max(0, instance.grants - grants)
        instance.last_used = now
        decisions: list[Decision] = []
        if instance.state is ModelState.DRAINING and instance.grants == 0:
            decisions.append(self._stop(instance))
        return [*decisions, *self._schedule(now)]

    def load(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: `Done` when ready, `Refuse` when the load fails. An earlier failure does not hold it back."""
        model = self.models[name]
        if model.instance is None:
            model.failure = None
        if model.state is ModelState.READY:
            return [Done(waiter)]
        if self._is_shut_down:
            return [Refuse(waiter, "server_shutting_down", "the server is shutting down")]
        model.waiters[waiter] = _Waiter(waiter, now, gets_grant=False)
        return list(self._schedule(now))

    def unload(self, waiter: int, name: str, now: float) -> list[Decision]:
        """Command: drain and stop; `Done` when the instance is gone. A preload is not begun again by itself."""
        model = self.models[name]
        model.wanted_since = None
        if model.instance is None:
            model.failure = None
            return [Done(waiter)]
        model.stop_waiters.append(waiter)
        return [*self._drain(model.instance, _Why.ORDER), *self._schedule(now)]

    def preload(self, now: float) -> list[Decision]:
        """Start what is to be loaded from the beginning."""
        for model in self.models.values():
            if model.preload and model.instance is None:
                model.wanted_since = now
        return list(self._schedule(now))

    def shut_down(self) -> list[Decision]:
        """Refuse all who wait, stop all instances, whatever is in flight."""
        self._is_shut_down = True
        decisions: list[Decision] = []
        for model in self.models.values():
            model.wanted_since = None
            decisions += [
                Refuse(waiter, "server_shutting_down", "the server is shutting down") for waiter in model.waiters
            ]
            model.waiters.clear()
        running = [one for one in self._instances.values() if one.state is not ModelState.STOPPING]
        return [*decisions, *(self._stop(instance) for instance in running)]

    # ── what happens to instances ────────────────────────────────────────────────────────────────────────────────

    def adopt(self, instance_id: str, name: str, now: float) -> None:
        """An engine of an earlier manager serves on. Its grants come with `restore`."""
        instance = Instance(instance_id, name, ModelState.READY, now, now, now + _ADOPTION_TIME, now)
        self._instances[instance_id] = self.models[name].instance = instance

    def restore(self, instance_id: str, grants: int) -> None:
        """A worker that came back to a new manager still has requests in flight there."""
        if instance := self._instances.get(instance_id):
            instance.grants += grants

    def is_draining(self, instance_id: str) -> bool:
        instance = self._instances.get(instance_id)
        return instance is not None and instance.state is ModelState.DRAINING

    def on_ready(self, instance_id: str, now: float) -> list[Decision]:
        """The instance answers: all who wait for its model are served. Ignored when it is being stopped."""
        instance = self._instances.get(instance_id)
        if instance is None or instance.state is not ModelState.STARTING:
            return []
        instance.state = ModelState.READY
        instance.ready_at = instance.last_used = now
        instance.evictable_at = now + self.policy.min_loaded_time
        self.models[instance.model].wanted_since = None
        return [*self._grant_waiters(instance, now), *self._schedule(now)]

    def on_exited(self, instance_id: str, reason: str, now: float) -> list[Decision]:
        """The process ended by itself, loading or loaded. Who waits for a load that failed is refused with `reason`."""
        instance = self._instances.get(instance_id)
        if instance is None:
            return []
        if instance.state is ModelState.STOPPING:
            return self.on_stopped(instance_id, now)
        model = self.models[instance.model]
        was_loading = instance.state is ModelState.STARTING
        model.failure = _next_failure(model.failure, instance, reason, now)
        if model.preload and instance.why is not _Why.ORDER:
            model.wanted_since = now
        decisions = self._remove(instance)
        if was_loading or now < model.failure.retry_at:
            decisions += [_refuse(waiter, model, model.failure, now) for waiter in model.waiters]
            model.waiters.clear()
        return [*decisions, *self._schedule(now)]

    def on_stopped(self, instance_id: str, now: float) -> list[Decision]:
        """The process that was told to stop is gone and its room is free."""
        instance = self._instances.get(instance_id)
        if instance is None:
            return []
        self.models[instance.model].failure = None
        return [*self._remove(instance), *self._schedule(now)]

    def mark_failed(self, name: str, reason: str, now: float) -> None:
        """Known before any load (a missing file): shown, and tried again on the next request."""
        if self.models[name].instance is None:
            self.models[name].failure = Failure(reason, now, 0)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now: float) -> list[Decision]:
        """Unload what was idle for too long, and do what waited for its time."""
        decisions: list[Decision] = [self._stop(instance) for instance, at in list(self._idle_ends()) if at <= now]
        return [*decisions, *self._schedule(now)]

    def next_tick(self, now: float) -> float | None:
        """When `tick` has something to do if nothing happens before, or None."""
        times = [at for _, at in self._idle_ends()]
        waiting = self._waiting()
        times += [at for model in waiting if (at := self._startable_at(model)) > now]
        if any(self._startable_at(model) <= now for model in waiting) or self._free() < 0:
            ready = [i for i in self._placed() if i.state is ModelState.READY]
            times += [i.evictable_at for i in ready]
            times += [since + self.policy.max_wait_time for m in waiting if (since := m.wanted_at()) is not None]
        later = [at for at in times if at > now]
        due = any(at <= now for _, at in self._idle_ends())
        return now if due else min(later, default=None)

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _schedule(self, now: float) -> Iterator[Decision]:
        """Start what is waited for, oldest first, and make room for requests that find none."""
        if self._is_shut_down:
            return
        wanted: list[Model] = []
        for model in [model for model in self._waiting() if self._startable_at(model) <= now]:
            if self._free() > 0 or not model.takes_place:
                yield self._start(model, now)
            else:
                wanted.append(model)
        # A preload that nobody waits for takes a free place only: it must not push out what is in use.
        wanted = [model for model in wanted if model.waiters]
        missing = max(0, len(wanted) - self._free())
        leaving = [i for i in self._placed() if i.state in {ModelState.DRAINING, ModelState.STOPPING}]
        for instance in self._surplus(leaving, missing):
            yield from self._undrain(instance, now)
            leaving.remove(instance)
        for position in range(len(leaving), missing):
            waits_for_long = self._waits_for_long(wanted, position, now)
            victim = self._victim(now, may_be_busy=waits_for_long)
            if victim is None:
                return
            yield from self._drain(victim, _Why.ROOM)

    def _waits_for_long(self, wanted: list[Model], position: int, now: float) -> bool:
        since = wanted[position].wanted_at() if position < len(wanted) else None
        return since is not None and now - since >= self.policy.max_wait_time

    def _waiting(self) -> list[Model]:
        """Models without an instance that somebody waits for, the longest wait first."""
        waiting = [
            (since, model)
            for model in self.models.values()
            if model.instance is None and (since := model.wanted_at()) is not None
        ]
        return [model for _, model in sorted(waiting, key=lambda pair: pair[0])]

    @staticmethod
    def _startable_at(model: Model) -> float:
        return model.failure.retry_at if model.failure else 0.0

    def _free(self) -> int:
        """Places left; negative when adopted instances are more than allowed."""
        return self.policy.max_loaded - len(self._placed())

    def _placed(self) -> list[Instance]:
        return [i for i in self._instances.values() if self.models[i.model].takes_place]

    def _victim(self, now: float, *, may_be_busy: bool) -> Instance | None:
        candidates = [
            instance
            for instance in self._placed()
            if instance.state is ModelState.READY
            and instance.evictable_at <= now
            and (instance.grants == 0 or may_be_busy)
        ]
        if not candidates:
            return None
        return min(candidates, key=lambda i: (i.grants > 0, self.models[i.model].preload, i.last_used, i.id))

    def _surplus(self, leaving: list[Instance], missing: int) -> list[Instance]:
        """Instances that drain for a room nobody needs any more; those that are waited for go back first."""
        undrainable = [i for i in leaving if i.state is ModelState.DRAINING and i.why is _Why.ROOM]
        undrainable.sort(key=lambda i: not self.models[i.model].waiters)
        return undrainable[: max(0, len(leaving) - missing)]

    def _undrain(self, instance: Instance, now: float) -> Iterator[Decision]:
        instance.state, instance.why = ModelState.READY, None
        yield from self._grant_waiters(instance, now)

    def _start(self, model: Model, now: float) -> Start:
        instance = Instance(self._new_id(), model.name, started_at=now, last_used=now)
        self._instances[instance.id] = model.instance = instance
        return Start(instance.id, model.name)

    def _drain(self, instance: Instance, why: _Why) -> Iterator[Decision]:
        if instance.state is ModelState.STOPPING:
            return
        instance.why = why
        if instance.state is ModelState.STARTING or instance.grants == 0:
            yield self._stop(instance)
        elif instance.state is ModelState.READY:
            instance.state = ModelState.DRAINING
            yield Drain(instance.id)

    def _stop(self, instance: Instance) -> Stop:
        instance.state = ModelState.STOPPING
        return Stop(instance.id)

    def _remove(self, instance: Instance) -> list[Decision]:
        del self._instances[instance.id]
        model = self.models[instance.model]
        model.instance = None
        done: list[Decision] = [Done(waiter) for waiter in model.stop_waiters]
        model.stop_waiters.clear()
        return done

    def _grant(self, instance: Instance, waiter: int, now: float) -> Grant:
        instance.grants += 1
        instance.last_used = now
        return Grant(waiter, instance.id)

    def _grant_waiters(self, instance: Instance, now: float) -> Iterator[Decision]:
        model = self.models[instance.model]
        waiters = list(model.waiters.values())
        model.waiters.clear()
        for waiter in waiters:
            yield self._grant(instance, waiter.id, now) if waiter.gets_grant else Done(waiter.id)

    def _idle_ends(self) -> Iterator[tuple[Instance, float]]:
        """Idle instances and when they are to be unloaded."""
        for instance in self._instances.values():
            timeout = self.models[instance.model].unload_timeout
            if instance.is_idle() and timeout > 0:
                yield instance, max(instance.last_used + timeout, instance.evictable_at)


def _next_failure(last: Failure | None, instance: Instance, reason: str, now: float) -> Failure:
    """A failed load backs off; the first crash of an instance that had been ready is restarted at once."""
    was_ready = instance.state is not ModelState.STARTING
    is_stable = was_ready and now - instance.ready_at >= _STABLE_TIME
    count = 1 if last is None or is_stable else last.count + 1
    free_tries = 1 if was_ready else 0
    if count <= free_tries:
        return Failure(reason, now, count)
    backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** (count - free_tries - 1))
    return Failure(reason, now + backoff, count)


def _refuse(waiter: int, model: Model, failure: Failure, now: float) -> Refuse:
    message = f"model {model.name!r} failed to load: {failure.reason}"
    return Refuse(waiter, "model_load_failed", message, max(0.0, failure.retry_at - now))
