"""Which instances may make room for another model, and which of them first. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llm_api_server.manager.scheduling.state import Allocation, Model, Policy
from llm_api_server.types import ModelState


def candidates(
    model: Model,
    bookings: Iterable[Allocation],
    models: Mapping[str, Model],
    policy: Policy,
    now: float,
    *,
    may_be_busy: bool,
) -> list[Allocation]:
    """What may make room for `model`, the best to go first."""

    def is_candidate(booking: Allocation) -> bool:
        other = models[booking.model]
        if booking.model == model.name or not other.takes_place or other.is_pinned:
            return False
        is_free = booking.state is ModelState.READY and booking.evictable_at <= now
        is_idle = booking.grants == 0 and not other.queue
        may_go = is_idle or (may_be_busy and has_had_its_turn(booking, models, policy, now))
        return booking.is_asleep or booking.drains_for_room or (is_free and may_go)

    def cost(booking: Allocation) -> tuple[bool, bool, bool, bool, float, str]:
        other = models[booking.model]
        is_busy = booking.grants > 0 and not booking.drains_for_room
        return is_busy, booking.is_idle, other.is_waited_for, other.preload, booking.last_used, booking.id

    return sorted(filter(is_candidate, bookings), key=cost)


def has_had_its_turn(booking: Allocation, models: Mapping[str, Model], policy: Policy, now: float) -> bool:
    """Those who had waited for it to become ready are served first, as far as the time goes."""
    is_over = now - booking.ready_at >= policy.max_wait_time
    return is_over or not models[booking.model].queue.has_from_before(booking.ready_at)


def surplus(bookings: Iterable[Allocation], models: Mapping[str, Model], count: int, now: float) -> list[Allocation]:
    """So many idle ones, the best to go first, where there are more instances than places."""

    def may_go(booking: Allocation) -> bool:
        model = models[booking.model]
        return booking.is_idle and booking.evictable_at <= now and model.takes_place and not model.is_pinned

    return sorted(filter(may_go, bookings), key=lambda b: (models[b.model].preload, b.last_used, b.id))[:count]


def times(
    bookings: Iterable[Allocation], waiting: Iterable[Model], models: Mapping[str, Model], policy: Policy, now: float
) -> list[float]:
    """When an instance may begin to make room that may not yet."""
    ready = [booking for booking in bookings if booking.state is ModelState.READY]
    unserved = [booking for booking in ready if not has_had_its_turn(booking, models, policy, now)]
    waits = [since for model in waiting if (since := model.waited_for_since()) is not None]
    starts = [*(booking.ready_at for booking in unserved), *waits]
    return [*(booking.evictable_at for booking in ready), *(start + policy.max_wait_time for start in starts)]
