"""Placement of a model: on free devices, or on those that the fewest evictions free. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from llm_api_server.engines.base import NO_PLACEMENT, Placement
from llm_api_server.manager.scheduling.memory import MemoryBudget, memory_of, tighter
from llm_api_server.manager.scheduling.state import Allocation, Model
from llm_api_server.types import ModelState

#: The smallest set of victims is searched among this many candidates; of more, the first that suffice are taken.
_MAX_COMBINED = 12


@dataclass(frozen=True)
class EvictionPlan:
    """`victims` sleep if `may_sleep`, else they end; then the model starts at `placement`."""

    victims: tuple[Allocation, ...]
    placement: Placement
    may_sleep: bool


class PlacementPass:
    """Placement within one pass of the scheduler. Each decision of the pass counts for the next.

    `current` counts every instance, `projected` leaves out those that are about to leave.
    """

    def __init__(self, empty: MemoryBudget, allocations: Iterable[Allocation], models: Mapping[str, Model]) -> None:
        self._models = models
        self._allocations = [one for one in allocations if models[one.model].is_local]
        self.current, self.projected = empty.copy(), empty.copy()
        for one in self._allocations:
            self.current.add(one.memory, models=0 if one.is_asleep else 1)
            remains = not one.is_leaving and one.state is not ModelState.SLEEPING
            self.projected.add(one.projected_memory, models=1 if remains else 0)
        self.victims: set[str] = set()

    def place_now(self, model: Model) -> Placement | None:
        """Return where the model can start (or wake) at once, without memory that is reserved for others."""
        return self._place(model, tighter(self.current, self.projected))

    def place_later(self, model: Model) -> Placement | None:
        """Return where the model can start once the instances that are leaving are gone."""
        return self._place(model, self.projected)

    def must_wait(self, model: Model, placement: Placement) -> bool:
        """Return whether another start on these devices is under way and one of the two measures free memory."""
        devices = {device.device for device in placement.devices}
        return any(
            not devices.isdisjoint(one.memory_awake) and (_measures(model) or _measures(self._models[one.model]))
            for one in self._allocations
            if one.state is ModelState.STARTING
        )

    def reserve(self, model: Model, placement: Placement, *, at_once: bool) -> None:
        """Count `placement` as the model's, at once or only for the projection."""
        if not model.is_local:
            return
        before = model.allocation.memory if model.allocation is not None else {}
        for budget in (self.current, self.projected) if at_once else (self.projected,):
            budget.remove(before)
            budget.add(memory_of(placement), models=1)

    def add_start(self, model: Model) -> None:
        """Count the model's start as under way."""
        if model.allocation is not None and model.allocation not in self._allocations:
            self._allocations.append(model.allocation)

    def evict(self, plan: EvictionPlan) -> None:
        self.victims |= {victim.id for victim in plan.victims}
        for victim in plan.victims:
            _remove(self.projected, victim, may_sleep=plan.may_sleep)

    def plan_eviction(self, model: Model, candidates: Sequence[Allocation]) -> EvictionPlan | None:
        """Return the smallest eviction among `candidates` (best first) that frees enough; by sleep if that suffices."""
        candidates = [one for one in candidates if one.id not in self.victims]
        for may_sleep in (True, False):
            for chosen in _selections(candidates):
                budget = self.projected.copy()
                for victim in chosen:
                    _remove(budget, victim, may_sleep=may_sleep)
                if (placement := self._place(model, budget)) is not None:
                    return EvictionPlan(tuple(chosen), placement, may_sleep)
        return None

    def _place(self, model: Model, budget: MemoryBudget) -> Placement | None:
        if not model.is_local:
            return NO_PLACEMENT
        allocation = model.allocation
        if allocation is None or not allocation.is_asleep:
            return budget.place(model.need)
        kept = allocation.memory
        more = {device: size - kept.get(device, 0) for device, size in allocation.memory_awake.items()}
        return allocation.placement if budget.fits(more) else None


def _selections(candidates: Sequence[Allocation]) -> Iterable[Sequence[Allocation]]:
    best = candidates[:_MAX_COMBINED]
    for size in range(1, len(best) + 1):
        yield from combinations(best, size)
    for size in range(len(best) + 1, len(candidates) + 1):
        yield candidates[:size]


def _remove(budget: MemoryBudget, victim: Allocation, *, may_sleep: bool) -> None:
    is_sleeping = victim.state is ModelState.SLEEPING
    budget.remove(victim.projected_memory, models=0 if is_sleeping else 1)
    if may_sleep and victim.sleep_footprint is not None and not is_sleeping:
        budget.add(victim.memory_asleep(2))


def _measures(model: Model) -> bool:
    return model.need is not None and model.need.measures_memory
