"""What the scheduler answers those whom it sends away, and when they should come again. Pure; times in seconds."""

from __future__ import annotations

from collections.abc import Iterable

from llm_api_server.ipc.lease_messages import Claim
from llm_api_server.ipc.messages import Refused
from llm_api_server.manager.scheduling.memory import MemoryBudget, why_never, why_not_now
from llm_api_server.manager.scheduling.state import Allocation, Failure, Model, Policy, Refuse

#: Back-off after the n-th failed load or crash in a row, in seconds.
_FIRST_BACKOFF = 2.0
_LONGEST_BACKOFF = 60.0
#: An instance that was ready this long did not crash "in a row".
_STABLE_TIME = 60.0
#: Of a load when none was measured, and when it takes longer than the last one.
_USUAL_LOAD = 15.0
_LEAST_WAIT = 1.0
#: Who is told to wait longer than this may as well look again.
_LONGEST_WAIT = 60.0
#: Seconds after which memory that other programs hold is looked at again.
_FOREIGN_RETRY = 10.0
#: Between two turns when none was measured.
_USUAL_INTERVAL = 1.0


def shutting_down(waiter: int) -> Refuse:
    return Refuse(waiter, "server_shutting_down", "the server is shutting down")


def failed(waiter: int, model: Model, failure: Failure, now: float) -> Refuse:
    message = f"model {model.name!r} failed to load: {failure.reason}"
    return Refuse(waiter, "model_load_failed", message, max(0.0, failure.retry_at - now))


def failed_all(model: Model, failure: Failure, now: float) -> list[Refuse]:
    """Whoever waits for `model`."""
    refusals = [failed(waiter, model, failure, now) for waiter in (*model.queue.clear(), *model.load_waiters)]
    model.load_waiters.clear()
    return refusals


def gone(waiter: int, model: str) -> Refuse:
    return Refuse(waiter, "model_not_found", f"model {model!r} is not configured any more")


def cannot_pin(request: int, model: str, *, is_known: bool) -> Refused:
    """To a command."""
    if not is_known:
        return Refused(request, "model_not_found", f"model {model!r} is not configured")
    return Refused(request, "model_not_loaded", f"model {model!r} is not loaded: load it first, then pin it")


def loading(waiter: int, model: Model, now: float) -> Refuse:
    wait = ready_in(model, now)
    message = f"model {model.name!r} is being loaded, and limits.when_loading is 'reject'; try again in {wait:.0f} s"
    return Refuse(waiter, "model_loading", message, wait)


def full(waiter: int, model: Model, models: Iterable[Model], policy: Policy, claim: Claim) -> Refuse | None:
    """Where there are as many as may wait: why this one may not."""
    length = len(model.queue)
    if length >= policy.queue_per_model:
        message = f"{length} requests wait for model {model.name!r}, and more may not (limits.queue_per_model)"
        return Refuse(waiter, "server_overloaded", message, _turn_in(model, length), length + 1)
    own = sum(one.queue.count_of(claim.key_id) for one in models)
    if own >= policy.queue_per_key:
        message = f"{own} requests of this key wait, and more may not (limits.queue_per_key); send fewer at a time"
        return Refuse(waiter, "slow_down", message, _turn_in(model, length), length + 1)
    return None


def impossible(model: Model, empty: MemoryBudget, now: float) -> Failure | None:
    """Why it cannot be loaded even if all others went, and when to look again. `empty` has nothing of ours."""
    if model.need is None:
        return None
    if (reason := why_never(model.need, empty.devices)) is not None:
        return Failure(reason, now, 0)
    if (reason := why_not_now(model.need, empty)) is not None:
        return Failure(reason, now + _FOREIGN_RETRY, 0)
    return None


def ready_in(model: Model, now: float) -> float:
    """When a load will be over, as far as the last one tells."""
    usual = _USUAL_LOAD if model.load_seconds is None else model.load_seconds
    booking = model.booking
    since = booking.started_at if booking is not None and booking.is_loading else now
    return max(_LEAST_WAIT, since + usual - now)


def next_failure(last: Failure | None, booking: Allocation, reason: str, now: float) -> Failure:
    """A failed load backs off; the first crash of an instance that had been ready is restarted at once."""
    was_ready = not booking.is_loading
    is_stable = was_ready and now - booking.ready_at >= _STABLE_TIME
    count = 1 if last is None or is_stable else last.count + 1
    free_tries = 1 if was_ready else 0
    if count <= free_tries:
        return Failure(reason, now, count)
    backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** (count - free_tries - 1))
    return Failure(reason, now + backoff, count)


def _turn_in(model: Model, position: int) -> float:
    """Seconds until so many have had their turn, as fast as it goes now."""
    interval = _USUAL_INTERVAL if model.queue.interval is None else model.queue.interval
    return min(_LONGEST_WAIT, max(_LEAST_WAIT, position * interval))
