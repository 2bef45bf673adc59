"""Answers whether a model would fit: now, after whom, or never, with the arithmetic. Pure; changes nothing."""

from __future__ import annotations

import math

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import Placement
from llm_api_server.formats import memory_size
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, Verdict
from llm_api_server.manager.scheduling.memory import describe, why_never, why_not_now
from llm_api_server.manager.scheduling.placement import EvictionPlan
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model


def explain(scheduler: Scheduler, name: str) -> Explanation:
    """What a request for `name` would lead to, as things are."""
    model = scheduler.models[name]
    verdict, message, evict, placement = _judge(scheduler, model)
    return Explanation(
        model=name,
        verdict=verdict,
        message=message,
        evict=evict,
        needs=describe(model.need) if model.need is not None else None,
        takes={seat.device: seat.size for seat in placement.devices} if placement is not None else {},
        places=scheduler.policy.max_loaded,
        places_free=max(0, scheduler.room().now.places),
        devices=device_statuses(scheduler),
    )


def device_statuses(scheduler: Scheduler) -> list[DeviceStatus]:
    return [_device_status(scheduler, device) for device in scheduler.devices]


def _judge(scheduler: Scheduler, model: Model) -> tuple[Verdict, str, list[str], Placement | None]:
    booking = model.booking
    if booking is not None and not booking.is_asleep:
        return "loaded", f"It is {booking.state}{_where(booking.placement)}.", [], booking.placement
    if not model.takes_place:
        return "fits", "It runs elsewhere and takes no memory here.", [], None
    if model.need is not None and (reason := why_never(model.need, scheduler.devices)) is not None:
        return "never", f"It can never be loaded here: {reason}.", [], None
    if (reason := _hindrance(scheduler, model)) is not None:
        return "not_now", f"It cannot be loaded now: {reason}.", [], None
    room = scheduler.room()
    if (placement := room.seats_now(model)) is not None:
        verb = "It sleeps and would wake" if booking is not None else "It fits now"
        return "fits", f"{verb}{_where(placement)}.", [], placement
    if (placement := room.seats_later(model)) is not None:
        return "after_waiting", f"It fits{_where(placement)} as soon as what is on its way out has gone.", [], placement
    for may_be_busy in (False, True):
        eviction = room.make(model, scheduler.candidates(model, math.inf, may_be_busy=may_be_busy))
        if eviction is not None:
            return _after(eviction, may_be_busy=may_be_busy)
    return "after_waiting", "It has to wait until a load that is under way has ended.", [], None


def _hindrance(scheduler: Scheduler, model: Model) -> str | None:
    """What stands in its way and does not go for its sake: other programs, pinned models."""
    reason = why_not_now(model.need, scheduler.empty(1)) if model.need is not None else None
    return reason if reason is not None else scheduler.why_pins_block(model)


def _after(eviction: EvictionPlan, *, may_be_busy: bool) -> tuple[Verdict, str, list[str], Placement | None]:
    names = [booking.model for booking in eviction.victims]
    listed = ", ".join(names)
    where = _where(eviction.placement)
    if may_be_busy:
        message = f"It fits{where} after evicting {listed}, which have requests in flight and finish them first."
    else:
        message = f"It fits{where} after evicting {listed}."
    return "after_evicting", message, names, eviction.placement


def _where(placement: Placement) -> str:
    """` on gpu0 (12.0 GiB of 24.0 GiB)`"""
    seats = [f"{seat.device} ({memory_size(seat.size)} of {memory_size(seat.total)})" for seat in placement.devices]
    return f" on {', '.join(seats)}" if seats else ""


def _device_status(scheduler: Scheduler, device: Device) -> DeviceStatus:
    taken = {b.model: size for b in scheduler.bookings.values() if (size := b.takes.get(device.id, 0)) > 0}
    return DeviceStatus(
        id=device.id,
        name=device.name,
        total=device.total,
        limit=device.capacity,
        foreign=scheduler.foreign.get(device.id, 0),
        taken=taken,
        free=max(0, scheduler.room().now.free(device)),
    )
