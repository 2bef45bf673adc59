"""What comes for instances that nobody uses, and when: sleep, deeper sleep, the end. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from llm_api_server.devices.device import RAM, Device
from llm_api_server.manager.scheduling.memory import MemoryBudget
from llm_api_server.manager.scheduling.state import Allocation, Model, Policy
from llm_api_server.types import ModelState


def ends(
    bookings: Iterable[Allocation], models: Mapping[str, Model], policy: Policy
) -> Iterator[tuple[Allocation, int, float]]:
    """Idle instances, what comes next for them (a level of sleep, 0 for the end), and when."""
    for booking in bookings:
        if not booking.is_idle and not booking.is_asleep:
            continue
        model = models[booking.model]
        if model.is_pinned:
            continue
        coming = [(model.unload_timeout, 0)]
        if booking.is_asleep and booking.sleep_level == 1:
            coming.append((policy.deep_sleep_timeout, 2))
        elif booking.is_idle and can_sleep(booking, model) and not model.preload:
            coming.append((policy.sleep_timeout, 1))
        if coming := [(timeout, level) for timeout, level in coming if timeout > 0]:
            timeout, level = min(coming)
            yield booking, level, max(booking.last_used + timeout, booking.evictable_at)


def can_sleep(booking: Allocation, model: Model) -> bool:
    return booking.asleep is not None and not model.refuses_sleep


def sleep_level(
    booking: Allocation, bookings: Iterable[Allocation], policy: Policy, devices: Sequence[Device], later: MemoryBudget
) -> int:
    """1 while the budget and the machine have RAM for its weights."""
    weights = booking.asleep.weight_bytes if booking.asleep is not None else 0
    sleepers = [one for one in bookings if one.state is ModelState.SLEEPING and one.sleep_level == 1]
    used = sum(one.asleep.weight_bytes for one in sleepers if one.asleep is not None)
    has_ram = all(later.free(device) >= weights for device in devices if device.id == RAM)
    return 1 if used + weights <= policy.sleep_bytes and has_ram else 2
