"""Slots of an instance: which request may start, and how many slots a worker may reuse. Pure.

On an instance with few slots, workers acquire each slot for one request, so that the running requests of each key are
known. The last free slot is reserved for keys that have no running request while several keys are active. The prompts
in prefill at the same time are bounded by one batch, because each prefill delays the first tokens of all.

On an instance with many slots, workers hold a batch of slots while no request waits: slots become free often, and the
traffic is too fast to acquire one per request.
"""

from __future__ import annotations

from collections.abc import Iterable

from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.state import Allocation, Model

#: An instance with at most this many slots has few.
FEW_SLOTS = 16
#: A worker gets at most 1/8 of the free slots, so that other workers find some, and never more than 255.
_BATCH_DIVISOR = 8
_MAX_BATCH = 255
#: Prompt tokens that are in prefill at the same time.
_MAX_PREFILL_TOKENS = 256
#: Seconds after which a long prompt no longer holds back other requests.
_MAX_PREFILL_TIME = 5.0


def may_start(allocation: Allocation, model: Model, claim: Claim, now: float) -> bool:
    """Return whether a slot is free for a request with this claim."""
    if claim.is_light or model.slots is None:
        return True
    free = model.slots - allocation.held_slots
    if free > 0 and _has_few_slots(model) and not _may_prefill(allocation, claim, now):
        return False
    if free != 1 or not _has_few_slots(model) or model.slots == 1:
        return free > 0
    is_first_of_key = not claim.is_batch and allocation.running[claim.key_id] == 0
    return is_first_of_key or not model.queue.has_other_keys(claim.key_id, now)


def take_slots(allocation: Allocation, model: Model, waiter: int, claim: Claim, now: float) -> tuple[int, bool]:
    """Take slots for a request that starts; return their number, and whether the worker holds them until revoked."""
    if _has_few_slots(model):
        allocation.running[claim.key_id] += 1
        if claim.prefill_tokens:
            allocation.prefilling[waiter] = (claim.prefill_tokens, now + _MAX_PREFILL_TIME)
        allocation.held_slots += 1
        return 1, False
    allocation.is_revoked = bool(model.queue)
    slots = 1
    if not allocation.is_revoked:
        free = _MAX_BATCH * _BATCH_DIVISOR if model.slots is None else model.slots - allocation.held_slots - 1
        slots += max(0, min(_MAX_BATCH, free // _BATCH_DIVISOR))
    allocation.held_slots += slots
    return slots, not allocation.is_revoked


def end_requests(allocation: Allocation, model: Model, ended: Iterable[EndedRequest]) -> None:
    """Remove ended requests from the running ones, and charge their keys what they cost beyond their claims."""
    for one in ended:
        if allocation.running[one.key_id] > 0:
            allocation.running[one.key_id] -= 1
        if not allocation.running[one.key_id]:
            del allocation.running[one.key_id]
        model.queue.charge(one.key_id, one.extra_cost)


def next_prefill_end(allocation: Allocation, now: float) -> float | None:
    """Return when a long prompt stops holding back other requests, or None."""
    return min((until for _, until in allocation.prefilling.values() if until > now), default=None)


def _may_prefill(allocation: Allocation, claim: Claim, now: float) -> bool:
    prefilling = [tokens for tokens, until in allocation.prefilling.values() if until > now]
    return not prefilling or sum(prefilling) + claim.prefill_tokens <= _MAX_PREFILL_TOKENS


def _has_few_slots(model: Model) -> bool:
    return model.slots is not None and model.slots <= FEW_SLOTS
