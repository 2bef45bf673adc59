"""What comes for instances that nobody uses, and when: sleep, deeper sleep, the end. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llm_api_server.manager.booking import Booking, Model, Policy


def ends(
    bookings: Iterable[Booking], models: Mapping[str, Model], policy: Policy
) -> Iterator[tuple[Booking, int, float]]:
    """Idle instances, what comes next for them (a level of sleep, 0 for the end), and when."""
    for booking in bookings:
        if not booking.is_idle and not booking.is_asleep:
            continue
        model = models[booking.model]
        coming = [(model.unload_timeout, 0)]
        if booking.is_asleep and booking.sleep_level == 1:
            coming.append((policy.deep_sleep_timeout, 2))
        elif booking.is_idle and can_sleep(booking, model) and not model.preload:
            coming.append((policy.sleep_timeout, 1))
        if coming := [(timeout, level) for timeout, level in coming if timeout > 0]:
            timeout, level = min(coming)
            yield booking, level, max(booking.last_used + timeout, booking.evictable_at)


def can_sleep(booking: Booking, model: Model) -> bool:
    return booking.asleep is not None and not model.refuses_sleep
