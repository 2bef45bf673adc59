"""Instances that may be evicted for another model, in order of preference, and pinned ones that may not. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llm_api_server.engines.explain import OUT_OF_MEMORY
from llm_api_server.manager.scheduling.memory import MemoryBudget, describe
from llm_api_server.manager.scheduling.placement import PlacementPass
from llm_api_server.manager.scheduling.state import Allocation, Model, Policy
from llm_api_server.types import ModelState


def candidates(
    model: Model,
    allocations: Iterable[Allocation],
    models: Mapping[str, Model],
    policy: Policy,
    now: float,
    *,
    may_be_busy: bool,
) -> list[Allocation]:
    """Return the instances that may be evicted for `model`, best first."""

    def is_candidate(one: Allocation) -> bool:
        other = models[one.model]
        if one.model == model.name or not other.is_local or other.is_pinned:
            return False
        is_evictable = one.state is ModelState.READY and one.evictable_at <= now
        is_idle = one.held_slots == 0 and not other.queue
        may_go = is_idle or (may_be_busy and has_served_its_queue(one, models, policy, now))
        return one.is_asleep or one.is_draining_for_eviction or (is_evictable and may_go)

    def preference(one: Allocation) -> tuple[bool, bool, bool, bool, float, str]:
        other = models[one.model]
        is_busy = one.held_slots > 0 and not one.is_draining_for_eviction
        return is_busy, one.is_idle, other.has_waiters, other.preload, one.last_used, one.id

    return sorted(filter(is_candidate, allocations), key=preference)


def has_served_its_queue(allocation: Allocation, models: Mapping[str, Model], policy: Policy, now: float) -> bool:
    """Return whether it has served what waited for it to become ready, or `max_wait_time` has passed."""
    is_over = now - allocation.ready_at >= policy.max_wait_time
    return is_over or not models[allocation.model].queue.has_from_before(allocation.ready_at)


def surplus(allocations: Iterable[Allocation], models: Mapping[str, Model], count: int, now: float) -> list[Allocation]:
    """Return up to `count` idle instances to stop where more are loaded than `max_loaded` allows, best first."""

    def may_go(one: Allocation) -> bool:
        model = models[one.model]
        return one.is_idle and one.evictable_at <= now and model.is_local and not model.is_pinned

    return sorted(filter(may_go, allocations), key=lambda one: (models[one.model].preload, one.last_used, one.id))[
        :count
    ]


def times(
    allocations: Iterable[Allocation], waiting: Iterable[Model], models: Mapping[str, Model], policy: Policy, now: float
) -> list[float]:
    """Return the times at which an instance becomes evictable that is not evictable yet."""
    ready = [one for one in allocations if one.state is ModelState.READY]
    unserved = [one for one in ready if not has_served_its_queue(one, models, policy, now)]
    waits = [since for model in waiting if (since := model.waiting_since()) is not None]
    starts = [*(one.ready_at for one in unserved), *waits]
    return [*(one.evictable_at for one in ready), *(start + policy.max_wait_time for start in starts)]


def pinned_obstacle(
    model: Model, empty: MemoryBudget, allocations: Iterable[Allocation], models: Mapping[str, Model]
) -> str | None:
    """Return why `model` does not fit even if every unpinned instance is evicted. `empty` holds no instance of ours."""
    remaining = [one for one in allocations if models[one.model].is_pinned or one is model.allocation]
    if PlacementPass(empty, remaining, models).place_later(model) is not None:
        return None
    pinned = [one for one in remaining if one is not model.allocation and models[one.model].is_local]
    if not pinned:
        return None
    names = ", ".join(sorted(one.model for one in pinned))
    advice = "unpin or unload one of them" if len(pinned) > 1 else "unpin or unload it"
    if sum(not one.is_asleep for one in pinned) >= empty.models_left:
        return f"pinned models ({names}) use up models.max_loaded ({empty.models_left}): {advice}"
    needs = f"it needs {describe(model.need)}, and " if model.need is not None else ""
    return f"{OUT_OF_MEMORY}: {needs}pinned models ({names}) hold memory that it would need: {advice}"
