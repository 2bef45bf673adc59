"""Explains whether a model fits: now, after which evictions, or never, with the arithmetic. Pure; changes nothing."""

from __future__ import annotations

import math

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import Placement
from llm_api_server.formats import memory_size
from llm_api_server.ipc.model_status import DeviceStatus, Explanation, Verdict
from llm_api_server.manager.scheduling.memory import describe, foreign_obstacle, permanent_obstacle
from llm_api_server.manager.scheduling.placement import EvictionPlan
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.scheduling.state import Model

_Judgement = tuple[Verdict, str, list[str], Placement | None]


def explain(scheduler: Scheduler, name: str) -> Explanation:
    """Return what a request for `name` would cause now."""
    model = scheduler.models[name]
    verdict, message, evict, placement = _judge(scheduler, model)
    return Explanation(
        model=name,
        verdict=verdict,
        message=message,
        evict=evict,
        needs=describe(model.need) if model.need is not None else None,
        takes={device.device: device.size for device in placement.devices} if placement is not None else {},
        places=scheduler.policy.max_loaded,
        places_free=max(0, scheduler.placement_pass().current.models_left),
        devices=device_statuses(scheduler),
    )


def device_statuses(scheduler: Scheduler) -> list[DeviceStatus]:
    return [_device_status(scheduler, device) for device in scheduler.devices]


def _judge(scheduler: Scheduler, model: Model) -> _Judgement:
    allocation = model.allocation
    if allocation is not None and not allocation.is_asleep:
        return "loaded", f"It is {allocation.state}{_on(allocation.placement)}.", [], allocation.placement
    if not model.is_local:
        return "fits", "It runs on another server and takes no memory here.", [], None
    if model.need is not None and (reason := permanent_obstacle(model.need, scheduler.devices)) is not None:
        return "never", f"It can never be loaded here: {reason}.", [], None
    if (reason := _obstacle(scheduler, model)) is not None:
        return "not_now", f"It cannot be loaded now: {reason}.", [], None
    placing = scheduler.placement_pass()
    if (placement := placing.place_now(model)) is not None:
        verb = "It sleeps and would wake" if allocation is not None else "It fits now"
        return "fits", f"{verb}{_on(placement)}.", [], placement
    if (placement := placing.place_later(model)) is not None:
        return "after_waiting", f"It fits{_on(placement)} once the instances that are leaving are gone.", [], placement
    for may_be_busy in (False, True):
        candidates = scheduler.eviction_candidates(model, math.inf, may_be_busy=may_be_busy)
        if (plan := placing.plan_eviction(model, candidates)) is not None:
            return _after(plan, may_be_busy=may_be_busy)
    return "after_waiting", "It has to wait until a load in progress has completed.", [], None


def _obstacle(scheduler: Scheduler, model: Model) -> str | None:
    """Return what prevents the load and cannot be evicted: other programs or pinned models."""
    reason = foreign_obstacle(model.need, scheduler.empty_budget(1)) if model.need is not None else None
    return reason if reason is not None else scheduler.pinned_obstacle(model)


def _after(plan: EvictionPlan, *, may_be_busy: bool) -> _Judgement:
    names = [victim.model for victim in plan.victims]
    message = f"It fits{_on(plan.placement)} after evicting {', '.join(names)}"
    if may_be_busy:
        message += ", which have requests in flight and finish them first"
    return "after_evicting", f"{message}.", names, plan.placement


def _on(placement: Placement) -> str:
    """Return for example ` on gpu0 (12.0 GiB of 24.0 GiB)`."""
    parts = [f"{one.device} ({memory_size(one.size)} of {memory_size(one.total)})" for one in placement.devices]
    return f" on {', '.join(parts)}" if parts else ""


def _device_status(scheduler: Scheduler, device: Device) -> DeviceStatus:
    taken = {one.model: size for one in scheduler.allocations.values() if (size := one.memory.get(device.id, 0)) > 0}
    return DeviceStatus(
        id=device.id,
        name=device.name,
        total=device.total,
        limit=device.capacity,
        foreign=scheduler.foreign.get(device.id, 0),
        taken=taken,
        free=max(0, scheduler.placement_pass().current.free(device)),
    )
