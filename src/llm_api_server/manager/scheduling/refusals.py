"""Refusals of requests and commands: code, message, and when to try again. Pure; times in seconds."""

from __future__ import annotations

from collections.abc import Iterable

from llm_api_server.ipc.lease_messages import Claim
from llm_api_server.manager.scheduling.decisions import Refuse
from llm_api_server.manager.scheduling.memory import MemoryBudget, foreign_obstacle, permanent_obstacle
from llm_api_server.manager.scheduling.state import Allocation, Failure, Model, Policy

#: Back-off after the first failed load or crash in a row; it doubles with each further one.
_FIRST_BACKOFF = 2.0
_MAX_BACKOFF = 60.0
#: A crash of an instance that was ready for this long starts a new row.
_STABLE_TIME = 60.0
#: Duration of a load if none was measured.
_USUAL_LOAD_TIME = 15.0
#: Bounds of `retry_after`, for loads (the lower one) and queues.
_MIN_WAIT = 1.0
_MAX_WAIT = 60.0
#: Interval at which memory that other programs hold is measured again.
_FOREIGN_RETRY = 10.0
#: Interval between two requests served from a queue if none was measured.
_USUAL_INTERVAL = 1.0


def shutting_down(waiter: int) -> Refuse:
    return Refuse(waiter, "server_shutting_down", "the server is shutting down")


def load_failed(waiter: int, model: Model, failure: Failure, now: float) -> Refuse:
    message = f"model {model.name!r} failed to load: {failure.reason}"
    return Refuse(waiter, "model_load_failed", message, max(0.0, failure.retry_at - now))


def load_failed_for_all(model: Model, failure: Failure, now: float) -> list[Refuse]:
    """Refuse every request and command that waits for `model`."""
    refusals = [load_failed(waiter, model, failure, now) for waiter in (*model.queue.clear(), *model.load_waiters)]
    model.load_waiters.clear()
    return refusals


def model_removed(waiter: int, model: str) -> Refuse:
    return Refuse(waiter, "model_not_found", f"model {model!r} is no longer configured")


def model_loading(waiter: int, model: Model, now: float) -> Refuse:
    wait = ready_in(model, now)
    message = f"model {model.name!r} is loading, and limits.when_loading is 'reject'; try again in {wait:.0f} s"
    return Refuse(waiter, "model_loading", message, wait)


def queue_full(waiter: int, model: Model, models: Iterable[Model], policy: Policy, claim: Claim) -> Refuse | None:
    """Return the refusal if no further request may wait for the model or with the key, else None."""
    length = len(model.queue)
    if length >= policy.queue_per_model:
        message = f"{length} requests already wait for model {model.name!r} (limits.queue_per_model)"
        return Refuse(waiter, "server_overloaded", message, _queue_time(model, length), length + 1)
    own = sum(one.queue.count_of(claim.key_id) for one in models)
    if own >= policy.queue_per_key:
        message = f"{own} requests of this key already wait (limits.queue_per_key); send fewer at the same time"
        return Refuse(waiter, "slow_down", message, _queue_time(model, length), length + 1)
    return None


def memory_failure(model: Model, empty: MemoryBudget, now: float) -> Failure | None:
    """Return the failure if the model does not fit even with every other one unloaded. `empty` is without instances."""
    if model.need is None:
        return None
    if (reason := permanent_obstacle(model.need, empty.devices)) is not None:
        return Failure(reason, now, 0)
    if (reason := foreign_obstacle(model.need, empty)) is not None:
        return Failure(reason, now + _FOREIGN_RETRY, 0)
    return None


def ready_in(model: Model, now: float) -> float:
    """Return the seconds until a load completes, estimated from the last one."""
    usual = _USUAL_LOAD_TIME if model.load_seconds is None else model.load_seconds
    allocation = model.allocation
    since = allocation.started_at if allocation is not None and allocation.is_loading else now
    return max(_MIN_WAIT, since + usual - now)


def next_failure(last: Failure | None, allocation: Allocation, reason: str, now: float) -> Failure:
    """Return the failure with its back-off. The first crash of an instance that was ready has none."""
    was_ready = not allocation.is_loading
    is_stable = was_ready and now - allocation.ready_at >= _STABLE_TIME
    count = 1 if last is None or is_stable else last.count + 1
    free_tries = 1 if was_ready else 0
    if count <= free_tries:
        return Failure(reason, now, count)
    backoff = min(_MAX_BACKOFF, _FIRST_BACKOFF * 2 ** (count - free_tries - 1))
    return Failure(reason, now + backoff, count)


def _queue_time(model: Model, length: int) -> float:
    """Return the seconds until `length` requests are served, at the current rate."""
    interval = _USUAL_INTERVAL if model.queue.interval is None else model.queue.interval
    return min(_MAX_WAIT, max(_MIN_WAIT, length * interval))
