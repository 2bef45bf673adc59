"""Fair queue of the requests that wait for one model. Pure: time is an argument, in seconds.

Keys share by service: the cost of their requests so far, divided by their weights, as virtual token counters with
their lift (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). Requests of the class `batch` come
after all others, or once they have waited for `BATCH_PATIENCE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm_api_server.ipc.lease_messages import Claim

BATCH_PATIENCE = 60.0
#: A key counts as active for this long after its last request.
ACTIVE_TIME = 60.0
#: Weight of the last interval in the moving average of the intervals between requests served.
_SMOOTHING = 0.2
_MIN_WEIGHT = 1e-3

#: Lower is served first: not a batch, less service, served longer ago, waiting longer.
_Rank = tuple[bool, float, float, float]


@dataclass(frozen=True)
class Waiter:
    """A waiting request, and since when it waits."""

    id: int
    since: float
    claim: Claim


class FairQueue:
    """Queue of one model. A lane holds the requests of one key in one class, in order of arrival."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, bool], dict[int, Waiter]] = {}
        self._lane_of: dict[int, tuple[str, bool]] = {}
        #: Cost of the requests served for each key, divided by its weight, since the queue was last empty.
        self._service: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        #: Time at which each key was last served: of two keys with equal service, the earlier one comes first.
        self._served_at: dict[str, float] = {}
        #: Time of the last request of each key, oldest first.
        self._active: dict[str, float] = {}
        self._last_served_at: float | None = None
        #: Average seconds between two requests served from the queue; None: unknown.
        self.interval: float | None = None

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, waiter: int) -> bool:
        return waiter in self._lane_of

    def __iter__(self) -> Iterator[int]:
        return iter(self._lane_of)

    def mark_active(self, key_id: str, now: float) -> None:
        """Record a request of the key, whether it has to wait or not."""
        self._active.pop(key_id, None)
        self._active[key_id] = now
        self._expire_active(now)

    def has_other_keys(self, key_id: str, now: float) -> bool:
        """Return whether other keys are active."""
        self._expire_active(now)
        return len(self._active) > (key_id in self._active)

    def add(self, waiter: Waiter) -> None:
        """Add a request. An idle key earns no credit: it starts at the lowest service of the waiting keys."""
        claim = waiter.claim
        key = claim.key_id
        if self._service:
            others = [self._service.get(other, 0.0) for other, _ in self._lanes if other != key]
            if others and not self._is_waiting(key):
                self._service[key] = max(self._service.get(key, 0.0), min(others))
        self._weights[key] = max(_MIN_WEIGHT, claim.weight)
        lane = (key, claim.is_batch)
        self._lanes.setdefault(lane, {})[waiter.id] = waiter
        self._lane_of[waiter.id] = lane

    def remove(self, waiter: int) -> None:
        """Remove a request; unknown ones are ignored."""
        name = self._lane_of.pop(waiter, None)
        if name is None:
            return
        lane = self._lanes[name]
        del lane[waiter]
        if not lane:
            del self._lanes[name]
        if not self._lane_of:
            self._last_served_at = None

    def clear(self) -> list[int]:
        """Remove all requests and return them."""
        waiters = list(self._lane_of)
        for waiter in waiters:
            self.remove(waiter)
        return waiters

    def pop(self, now: float, may_start: Callable[[Claim], bool]) -> Waiter | None:
        """Remove and return the next request among those that may start, and charge its key the cost of its claim."""
        firsts = [next(iter(lane.values())) for lane in self._lanes.values()]
        waiter = min(
            (one for one in firsts if may_start(one.claim)), key=lambda one: self._rank(one, now), default=None
        )
        if waiter is None:
            return None
        if self._last_served_at is not None:
            gap = now - self._last_served_at
            self.interval = gap if self.interval is None else self.interval + _SMOOTHING * (gap - self.interval)
        self._last_served_at = self._served_at[waiter.claim.key_id] = now
        self.charge(waiter.claim.key_id, waiter.claim.cost)
        self.remove(waiter.id)
        return waiter

    def charge(self, key_id: str, cost: int) -> None:
        """Add cost to the service of a key. Requests served while nobody waits cost nothing."""
        if not self._lane_of:
            self._service.clear()
            self._weights.clear()
            self._served_at.clear()
            return
        self._service[key_id] = self._service.get(key_id, 0.0) + cost / self._weights.get(key_id, 1.0)

    def count_of(self, key_id: str) -> int:
        return sum(len(self._lanes.get((key_id, is_batch), ())) for is_batch in (False, True))

    def since(self) -> float | None:
        """Return when the longest wait began, or None. The wait of a batch begins when its patience ends."""
        return min((_since(next(iter(lane.values()))) for lane in self._lanes.values()), default=None)

    def has_from_before(self, at: float) -> bool:
        """Return whether a request waits that arrived before `at`."""
        return any(next(iter(lane.values())).since < at for lane in self._lanes.values())

    def positions(self, now: float) -> dict[int, int]:
        """Return the position of each request, from 1, if no request is added and all cost what they claim."""
        waiters = [waiter for lane in self._lanes.values() for waiter in lane.values()]
        waiters.sort(key=lambda waiter: (self._rank(waiter, now)[0], waiter.since))
        service = dict(self._service)
        served_at = dict(self._served_at)
        ranks: list[tuple[_Rank, int]] = []
        for waiter in waiters:
            key = waiter.claim.key_id
            is_late, _, _, since = self._rank(waiter, now)
            ranks.append(((is_late, service.get(key, 0.0), served_at.get(key, -math.inf), since), waiter.id))
            served_at[key] = now
            service[key] = service.get(key, 0.0) + waiter.claim.cost / self._weights[key]
        return {waiter: position for position, (_, waiter) in enumerate(sorted(ranks), 1)}

    def _rank(self, waiter: Waiter, now: float) -> _Rank:
        key = waiter.claim.key_id
        is_late = waiter.claim.is_batch and now - waiter.since < BATCH_PATIENCE
        return is_late, self._service.get(key, 0.0), self._served_at.get(key, -math.inf), waiter.since

    def _expire_active(self, now: float) -> None:
        while self._active:
            oldest = next(iter(self._active))
            if self._active[oldest] + ACTIVE_TIME >= now:
                return
            del self._active[oldest]

    def _is_waiting(self, key_id: str) -> bool:
        return (key_id, False) in self._lanes or (key_id, True) in self._lanes


def _since(waiter: Waiter) -> float:
    return waiter.since + BATCH_PATIENCE if waiter.claim.is_batch else waiter.since
