"""What the scheduler keeps books of: the models, one booking per engine process, and the decisions it makes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from llm_api_server.devices.device import RAM
from llm_api_server.engines.base import NO_PLACEMENT, ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.manager.scheduling.fair_queue import FairQueue
from llm_api_server.manager.scheduling.memory import taken_by
from llm_api_server.types import ModelState


@dataclass(frozen=True)
class Policy:
    """Times in seconds; a timeout of 0 means never. `sleep_bytes`: RAM that sleeping weights may take together.

    At most so many requests wait for a model, or of one key. With `rejects_loading` none waits for a load.
    """

    max_loaded: int
    min_loaded_time: float
    max_wait_time: float
    sleep_timeout: float = 0
    deep_sleep_timeout: float = 0
    sleep_bytes: int = 0
    queue_per_model: int = 1000
    queue_per_key: int = 500
    rejects_loading: bool = False


@dataclass(frozen=True)
class Start:
    instance: str
    model: str
    placement: Placement = NO_PLACEMENT


@dataclass(frozen=True)
class Revoke:
    """Tell the workers to start nothing more on it without asking, and to give back what is free."""

    instance: str


@dataclass(frozen=True)
class Sleep:
    """Give up device memory, keep the process; answered by `on_slept` or `on_sleep_failed`. Level 1 keeps the weights
    in RAM, 2 forgets them; from 1 to 2 it wakes in between.
    """

    instance: str
    level: int
    from_level: int = 0


@dataclass(frozen=True)
class Wake:
    """Answered by `on_ready` or `on_sleep_failed`."""

    instance: str
    level: int


@dataclass(frozen=True)
class Stop:
    """End the process; answered by `on_stopped` in any case."""

    instance: str


@dataclass(frozen=True)
class Grant:
    """`places` with that of the request; the worker `keeps` them until they are reclaimed."""

    waiter: int
    instance: str
    places: int = 1
    keeps: bool = False
    key_id: str = ""


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
    position: int | None = None


Decision = Start | Revoke | Sleep | Wake | Stop | Grant | Done | Refuse


class Why(Enum):
    """Why an instance drains: room for another can be taken back, an order cannot."""

    ROOM = "room"
    ORDER = "order"


@dataclass
class Allocation:
    """One engine process, from the decision to start it until it is gone. `grants` counts places that workers have."""

    id: str
    model: str
    state: ModelState = ModelState.STARTING
    started_at: float = 0.0
    ready_at: float = 0.0
    evictable_at: float = 0.0
    last_used: float = 0.0
    grants: int = 0
    #: Where each request asks: how many run of each key, and by waiter, whose prompts are read: tokens, and until when.
    running: Counter[str] = field(default_factory=Counter)
    reading: dict[int, tuple[int, float]] = field(default_factory=dict)
    #: The workers give places back.
    is_reclaimed: bool = False
    why: Why | None = None
    placement: Placement = NO_PLACEMENT
    asleep: SleepFootprint | None = None
    #: 0 awake, 1 with its weights in RAM, 2 without; of a sleeper, one falling asleep, and one that wakes.
    sleep_level: int = 0
    #: Of a sleeper: it has given its memory up, which was seen.
    is_settled: bool = False
    #: What it leaves by when it has drained for room.
    may_sleep: bool = False

    @property
    def is_idle(self) -> bool:
        return self.state is ModelState.READY and self.grants == 0

    @property
    def is_loading(self) -> bool:
        """From nothing; not waking."""
        return self.state is ModelState.STARTING and self.sleep_level == 0

    @property
    def drains_for_room(self) -> bool:
        return self.state is ModelState.DRAINING and self.why is Why.ROOM

    @property
    def is_asleep(self) -> bool:
        return self.state is ModelState.SLEEPING and self.is_settled

    @property
    def awake_takes(self) -> dict[str, int]:
        return taken_by(self.placement)

    def asleep_takes(self, level: int) -> dict[str, int]:
        """Level 0, which it was never told, is as 2."""
        if self.asleep is None:
            return {}
        taken = {seat.device: min(seat.size, self.asleep.device_bytes) for seat in self.placement.devices}
        if level == 1:
            taken[RAM] = taken.get(RAM, 0) + self.asleep.weight_bytes
        return taken

    @property
    def takes(self) -> Mapping[str, int]:
        """Of each device, now."""
        return self.asleep_takes(self.sleep_level) if self.is_asleep else self.awake_takes

    @property
    def will_take(self) -> Mapping[str, int]:
        """When what it is told to do is done."""
        if self.is_leaving:
            return {}
        return self.asleep_takes(self.sleep_level) if self.state is ModelState.SLEEPING else self.awake_takes

    @property
    def is_leaving(self) -> bool:
        """For good, whatever comes."""
        is_ordered = self.state is ModelState.DRAINING and self.why is Why.ORDER
        return self.state is ModelState.STOPPING or is_ordered


@dataclass(frozen=True)
class Failure:
    """Why the last load or run ended. Requests before `retry_at` are refused with `reason`."""

    reason: str
    retry_at: float
    count: int
    #: Nothing but pinned models stands in its way.
    is_by_pins: bool = False


@dataclass
class Model:
    """One configured model. Requests wait in its `queue`; `load_waiters` are commands, and since when they wait to hear
    that it is ready; `stop_waiters` wait for the instance to be gone.

    `takes_place` is False for what runs elsewhere: it neither counts against `max_loaded` nor makes room. `need` and
    `asleep` come from the model's files.
    """

    name: str
    unload_timeout: float
    preload: bool = False
    takes_place: bool = True
    need: Need | None = None
    asleep: SleepFootprint | None = None
    #: It is not configured any more.
    is_gone: bool = False
    #: It stays loaded, and awake, until it is unpinned or unloaded by order.
    is_pinned: bool = False
    #: It did not sleep or wake as told once.
    refuses_sleep: bool = False
    booking: Allocation | None = None
    #: Requests that an instance works on at a time; None: any number.
    places: int | None = None
    #: Of its last load, in seconds.
    load_seconds: float | None = None
    queue: FairQueue = field(default_factory=FairQueue)
    load_waiters: dict[int, float] = field(default_factory=dict)
    stop_waiters: list[int] = field(default_factory=list)
    failure: Failure | None = None
    #: When its last instance was told to end or sleep and had done so.
    left_at: float = float("-inf")
    #: Since when the server itself wants it loaded (preload), or None.
    wanted_since: float | None = None

    def learn(self, facts: ModelFacts, *, counts_memory: bool) -> None:
        """What its files tell."""
        self.need = facts.need if counts_memory else None
        self.asleep, self.places = facts.sleep_footprint, facts.slots

    @property
    def is_waited_for(self) -> bool:
        return bool(self.queue or self.load_waiters)

    def waited_for_since(self) -> float | None:
        """Since when a request or a command waits, or None; at the earliest from when it made room for another."""
        since = min((at for at in (self.queue.since(), *self.load_waiters.values()) if at is not None), default=None)
        return None if since is None else max(since, self.left_at)

    def wanted_at(self) -> float | None:
        """Since when somebody waits for a load, the server itself included, or None."""
        return min((at for at in (self.waited_for_since(), self.wanted_since) if at is not None), default=None)

    @property
    def startable_at(self) -> float:
        return self.failure.retry_at if self.failure else 0.0

    @property
    def state(self) -> ModelState:
        if self.booking is not None:
            return self.booking.state
        return ModelState.STOPPED if self.failure is None else ModelState.FAILED
