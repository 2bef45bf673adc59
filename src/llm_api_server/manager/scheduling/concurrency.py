"""The places of an instance: who may begin, and what a worker may begin without asking. Pure.

Of an instance with few places every request asks, so that it is known whose requests run: the last free place is left
to keys that have none running while several keys ask, and no more prompts are read at a time than make one batch, for
each that is read delays the first tokens of all. Of one with many, workers keep places for a while as long as
nobody waits: there a place gets free often enough, and traffic is too fast to ask for each.
"""

from __future__ import annotations

from collections.abc import Iterable

from llm_api_server.ipc.lease_messages import Claim, EndedRequest
from llm_api_server.manager.scheduling.state import Allocation, Model

#: Instances with so many places at most are asked for with each request.
FEW = 16
#: Of what is free a worker gets one part of so many, so that others find some; and no more than is used in moments.
_SPARE_PARTS = 8
_MOST_SPARE = 255
#: Tokens of prompts that are read at a time.
_MOST_READ = 256
#: Seconds after which a long prompt no longer keeps others from beginning.
_LONGEST_READ = 5.0


def may_begin(booking: Allocation, model: Model, claim: Claim, now: float) -> bool:
    if claim.is_light or model.places is None:
        return True
    free = model.places - booking.grants
    if free > 0 and _has_few(model) and not _may_read(booking, claim, now):
        return False
    if free != 1 or model.places > FEW or model.places == 1:
        return free > 0
    is_first = not claim.is_batch and booking.running[claim.key_id] == 0
    return is_first or not model.queue.has_others(claim.key_id, now)


def begin(booking: Allocation, model: Model, waiter: int, claim: Claim, now: float) -> tuple[int, bool]:
    """Places that a worker gets for a request that begins, and whether it keeps them."""
    if _has_few(model):
        booking.running[claim.key_id] += 1
        if claim.prefill_tokens:
            booking.reading[waiter] = (claim.prefill_tokens, now + _LONGEST_READ)
        booking.grants += 1
        return 1, False
    booking.is_reclaimed = bool(model.queue)
    places = 1
    if not booking.is_reclaimed:
        free = _MOST_SPARE * _SPARE_PARTS if model.places is None else model.places - booking.grants - 1
        places += max(0, min(_MOST_SPARE, free // _SPARE_PARTS))
    booking.grants += places
    return places, not booking.is_reclaimed


def end(booking: Allocation, model: Model, ended: Iterable[EndedRequest]) -> None:
    """Requests are over: what they made more of work than their claims said, counts for their keys."""
    for one in ended:
        if booking.running[one.key_id] > 0:
            booking.running[one.key_id] -= 1
        if not booking.running[one.key_id]:
            del booking.running[one.key_id]
        model.queue.charge(one.key_id, one.extra_cost)


def next_end_of_reading(booking: Allocation, now: float) -> float | None:
    """When a long prompt no longer keeps others from beginning, or None."""
    return min((until for _, until in booking.reading.values() if until > now), default=None)


def _may_read(booking: Allocation, claim: Claim, now: float) -> bool:
    reading = [tokens for tokens, until in booking.reading.values() if until > now]
    return not reading or sum(reading) + claim.prefill_tokens <= _MOST_READ


def _has_few(model: Model) -> bool:
    return model.places is not None and model.places <= FEW
