"""State of the scheduler: the policy, the models, and one allocation per engine process. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from llm_api_server.devices.device import RAM
from llm_api_server.engines.base import NO_PLACEMENT, ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.manager.scheduling.fair_queue import FairQueue
from llm_api_server.manager.scheduling.memory import memory_of
from llm_api_server.types import ModelState


@dataclass(frozen=True)
class Policy:
    """Limits from the configuration. Times in seconds; a timeout of 0 means never.

    `sleep_bytes` is the RAM for the weights of all sleeping instances. `queue_per_model` and `queue_per_key` bound the
    number of waiting requests. With `rejects_loading` no request waits for a load.
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


class DrainReason(Enum):
    """Reason why an instance drains. An eviction can be called off, a command cannot."""

    EVICTION = "eviction"
    COMMAND = "command"


@dataclass
class Allocation:
    """One engine process, from the decision to start it until it is gone."""

    id: str
    model: str
    state: ModelState = ModelState.STARTING
    started_at: float = 0.0
    ready_at: float = 0.0
    evictable_at: float = 0.0
    last_used: float = 0.0
    #: Slots that workers hold.
    held_slots: int = 0
    #: Running requests by key, if each request takes its slot from the manager.
    running: Counter[str] = field(default_factory=Counter)
    #: Requests in prefill, by waiter: prompt tokens, and the time until which they hold back others.
    prefilling: dict[int, tuple[int, float]] = field(default_factory=dict)
    #: The workers return their slots.
    is_revoked: bool = False
    drain_reason: DrainReason | None = None
    placement: Placement = NO_PLACEMENT
    sleep_footprint: SleepFootprint | None = None
    #: 0 awake, 1 with its weights in RAM, 2 without; also while it falls asleep or wakes.
    sleep_level: int = 0
    #: The device memory of a sleeping instance was measured to be free.
    is_memory_freed: bool = False
    #: An instance that drains for an eviction sleeps afterwards, instead of ending.
    may_sleep: bool = False

    @property
    def is_idle(self) -> bool:
        return self.state is ModelState.READY and self.held_slots == 0

    @property
    def is_loading(self) -> bool:
        """True for a start from nothing, False for waking."""
        return self.state is ModelState.STARTING and self.sleep_level == 0

    @property
    def is_draining_for_eviction(self) -> bool:
        return self.state is ModelState.DRAINING and self.drain_reason is DrainReason.EVICTION

    @property
    def is_asleep(self) -> bool:
        return self.state is ModelState.SLEEPING and self.is_memory_freed

    @property
    def is_leaving(self) -> bool:
        """True if nothing can keep the process any more."""
        is_ordered = self.state is ModelState.DRAINING and self.drain_reason is DrainReason.COMMAND
        return self.state is ModelState.STOPPING or is_ordered

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of each device, now."""
        return self.memory_asleep(self.sleep_level) if self.is_asleep else self.memory_awake

    @property
    def memory_awake(self) -> dict[str, int]:
        return memory_of(self.placement)

    def memory_asleep(self, level: int) -> dict[str, int]:
        """Return the bytes of each device at a level of sleep; level 0 counts as 2."""
        if self.sleep_footprint is None:
            return {}
        kept = {device.device: min(device.size, self.sleep_footprint.device_bytes) for device in self.placement.devices}
        if level == 1:
            kept[RAM] = kept.get(RAM, 0) + self.sleep_footprint.weight_bytes
        return kept

    @property
    def projected_memory(self) -> Mapping[str, int]:
        """Bytes of each device after the transition under way."""
        if self.is_leaving:
            return {}
        return self.memory_asleep(self.sleep_level) if self.state is ModelState.SLEEPING else self.memory_awake


@dataclass(frozen=True)
class Failure:
    """Reason why the last load or run ended. Requests before `retry_at` are refused with `reason`."""

    reason: str
    retry_at: float
    count: int
    #: Only pinned models prevent the load.
    is_caused_by_pins: bool = False


@dataclass
class Model:
    """One configured model, and the requests and commands that wait for it."""

    name: str
    unload_timeout: float
    preload: bool = False
    #: False for a remote model: it neither counts against `max_loaded` nor can it be evicted.
    is_local: bool = True
    need: Need | None = None
    sleep_footprint: SleepFootprint | None = None
    #: The configuration no longer contains it.
    is_removed: bool = False
    #: It stays loaded, and awake, until it is unpinned or a command unloads it.
    is_pinned: bool = False
    #: It failed once to fall asleep or to wake, and sleeps no more.
    has_failed_to_sleep: bool = False
    allocation: Allocation | None = None
    #: Requests that an instance runs at the same time; None: no limit.
    slots: int | None = None
    #: Duration of the last load, in seconds.
    load_seconds: float | None = None
    queue: FairQueue = field(default_factory=FairQueue)
    #: Commands that wait until the model is ready, with the time of their arrival.
    load_waiters: dict[int, float] = field(default_factory=dict)
    #: Commands that wait until the instance is gone.
    unload_waiters: list[int] = field(default_factory=list)
    failure: Failure | None = None
    #: Time at which its last instance ended or fell asleep as decided.
    freed_at: float = float("-inf")
    #: Time since which a preload is due.
    preload_due_since: float | None = None

    def update_facts(self, facts: ModelFacts, *, counts_memory: bool) -> None:
        """Apply the facts from the model's files."""
        self.need = facts.need if counts_memory else None
        self.sleep_footprint, self.slots = facts.sleep_footprint, facts.slots

    @property
    def has_waiters(self) -> bool:
        return bool(self.queue or self.load_waiters)

    def waiting_since(self) -> float | None:
        """Return when the longest wait of a request or command began, but not before the model's last instance left."""
        since = min((at for at in (self.queue.since(), *self.load_waiters.values()) if at is not None), default=None)
        return None if since is None else max(since, self.freed_at)

    def wanted_since(self) -> float | None:
        """Return since when a load is wanted, by a waiter or as a preload."""
        return min((at for at in (self.waiting_since(), self.preload_due_since) if at is not None), default=None)

    @property
    def startable_at(self) -> float:
        return self.failure.retry_at if self.failure else 0.0

    @property
    def state(self) -> ModelState:
        if self.allocation is not None:
            return self.allocation.state
        return ModelState.STOPPED if self.failure is None else ModelState.FAILED
