"""Transitions of idle instances, and their times: sleep, deeper sleep, unload. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llm_api_server.devices.device import RAM
from llm_api_server.manager.scheduling.memory import MemoryBudget
from llm_api_server.manager.scheduling.state import Allocation, Model, Policy
from llm_api_server.types import ModelState


def transitions(
    allocations: Iterable[Allocation], models: Mapping[str, Model], policy: Policy
) -> Iterator[tuple[Allocation, int, float]]:
    """Yield the idle instances, the next transition of each (a level of sleep, 0 for unload), and its time."""
    for one in allocations:
        model = models[one.model]
        if model.is_pinned or not (one.is_idle or one.is_asleep):
            continue
        options = [(model.unload_timeout, 0)]
        if one.is_asleep and one.sleep_level == 1:
            options.append((policy.deep_sleep_timeout, 2))
        elif one.is_idle and can_sleep(one, model) and not model.preload:
            options.append((policy.sleep_timeout, 1))
        if options := [(timeout, level) for timeout, level in options if timeout > 0]:
            timeout, level = min(options)
            yield one, level, max(one.last_used + timeout, one.evictable_at)


def can_sleep(allocation: Allocation, model: Model) -> bool:
    return allocation.sleep_footprint is not None and not model.has_failed_to_sleep


def sleep_level(
    allocation: Allocation, allocations: Iterable[Allocation], policy: Policy, projected: MemoryBudget
) -> int:
    """Return 1 while the policy and the host have RAM for the instance's weights, else 2."""
    weights = allocation.sleep_footprint.weight_bytes if allocation.sleep_footprint is not None else 0
    sleeping = [one for one in allocations if one.state is ModelState.SLEEPING and one.sleep_level == 1]
    used = sum(one.sleep_footprint.weight_bytes for one in sleeping if one.sleep_footprint is not None)
    has_ram = all(projected.free(device) >= weights for device in projected.devices if device.id == RAM)
    return 1 if used + weights <= policy.sleep_bytes and has_ram else 2
