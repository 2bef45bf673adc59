"""Requests that wait for one model, and whose turn it is. Pure: time is an argument, in seconds.

Keys take turns by the work that was done for them while others waited, divided by their weights: virtual token
counters with their lift, after Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Requests of the
class `batch` come when no other waits, or when they have waited for `BATCH_PATIENCE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm_api_server.ipc.lease_messages import Claim

BATCH_PATIENCE = 60.0
#: Who asked within this time counts as somebody to leave room for.
ACTIVE_TIME = 60.0
#: Of the time between two turns: how much the last one counts.
_SMOOTHING = 0.2
_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Waiter:
    id: int
    since: float
    claim: Claim


class FairQueue:
    """Of one model. A lane is what one key asks for in one class, in the order in which it came."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, bool], dict[int, Waiter]] = {}
        self._lane_of: dict[int, tuple[str, bool]] = {}
        #: Work done for each key, by its weight, since there was nobody waiting.
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        #: When each key had its last turn: of two that were served alike, the one whose was earlier comes first.
        self._turns: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._last_turn: float | None = None
        #: Seconds between two turns while somebody waits; None: not known.
        self.interval: float | None = None

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, waiter: int) -> bool:
        return waiter in self._lane_of

    def __iter__(self) -> Iterator[int]:
        return iter(self._lane_of)

    def note(self, claim: Claim, now: float) -> None:
        """The key asks, whether it has to wait or not."""
        self._asked.pop(claim.key_id, None)
        self._asked[claim.key_id] = now
        self._forget(now)

    def has_others(self, key_id: str, now: float) -> bool:
        """Whether other keys have asked of late."""
        self._forget(now)
        return len(self._asked) > (key_id in self._asked)

    def add(self, waiter: Waiter) -> None:
        """Time without requests earns no credit: a key begins where the one stands that was served least."""
        claim = waiter.claim
        key = claim.key_id
        if self._served:
            waiting = [self._served.get(other, 0.0) for other, _ in self._lanes if other != key]
            if waiting and not self._is_waiting(key):
                self._served[key] = max(self._served.get(key, 0.0), min(waiting))
        self._weights[key] = max(_LEAST_WEIGHT, claim.weight)
        lane = (key, claim.is_batch)
        self._lanes.setdefault(lane, {})[waiter.id] = waiter
        self._lane_of[waiter.id] = lane

    def remove(self, waiter: int) -> None:
        """It does not wait any more; unknown ones are ignored."""
        name = self._lane_of.pop(waiter, None)
        if name is None:
            return
        lane = self._lanes[name]
        del lane[waiter]
        if not lane:
            del self._lanes[name]
        if not self._lane_of:
            self._last_turn = None

    def clear(self) -> list[int]:
        """Who waited."""
        waiters = list(self._lane_of)
        for waiter in waiters:
            self.remove(waiter)
        return waiters

    def pop(self, now: float, may: Callable[[Claim], bool]) -> Waiter | None:
        """Whose turn it is among those who `may`; its work counts from now on."""
        firsts = [next(iter(lane.values())) for lane in self._lanes.values()]
        turn = min((one for one in firsts if may(one.claim)), key=lambda one: self._rank(one, now), default=None)
        if turn is None:
            return None
        if self._last_turn is not None:
            gap = now - self._last_turn
            self.interval = gap if self.interval is None else self.interval + _SMOOTHING * (gap - self.interval)
        self._last_turn = self._turns[turn.claim.key_id] = now
        self.charge(turn.claim.key_id, turn.claim.cost)
        self.remove(turn.id)
        return turn

    def charge(self, key_id: str, work: int) -> None:
        """Work that was done for a key, or is about to be. What nobody has to wait for counts for nothing."""
        if not self._lane_of:
            self._served.clear()
            self._weights.clear()
            self._turns.clear()
            return
        self._served[key_id] = self._served.get(key_id, 0.0) + work / self._weights.get(key_id, 1.0)

    def count_of(self, key_id: str) -> int:
        return sum(len(self._lanes.get((key_id, is_batch), ())) for is_batch in (False, True))

    def since(self) -> float | None:
        """Since when somebody waits; batches begin to when they are out of patience. None: nobody does."""
        return min((_since(next(iter(lane.values()))) for lane in self._lanes.values()), default=None)

    def has_from_before(self, at: float) -> bool:
        """Whether somebody waits who had come before then."""
        return any(next(iter(lane.values())).since < at for lane in self._lanes.values())

    def positions(self, now: float) -> dict[int, int]:
        """Of all who wait, from 1, if nobody comes and all make as much work as they say."""
        waiters = [waiter for lane in self._lanes.values() for waiter in lane.values()]
        waiters.sort(key=lambda waiter: (self._rank(waiter, now)[0], waiter.since))
        served = dict(self._served)
        turns = dict(self._turns)
        ranks: list[tuple[tuple[bool, float, float, float], int]] = []
        for waiter in waiters:
            key = waiter.claim.key_id
            is_late, _, _, since = self._rank(waiter, now)
            ranks.append(((is_late, served.get(key, 0.0), turns.get(key, -math.inf), since), waiter.id))
            turns[key] = now
            served[key] = served.get(key, 0.0) + waiter.claim.cost / self._weights[key]
        return {waiter: position for position, (_, waiter) in enumerate(sorted(ranks), 1)}

    def _rank(self, waiter: Waiter, now: float) -> tuple[bool, float, float, float]:
        key = waiter.claim.key_id
        is_late = waiter.claim.is_batch and now - waiter.since < BATCH_PATIENCE
        return is_late, self._served.get(key, 0.0), self._turns.get(key, -math.inf), waiter.since

    def _forget(self, now: float) -> None:
        while self._asked:
            oldest = next(iter(self._asked))
            if self._asked[oldest] + ACTIVE_TIME >= now:
                return
            del self._asked[oldest]

    def _is_waiting(self, key_id: str) -> bool:
        return (key_id, False) in self._lanes or (key_id, True) in self._lanes


def _since(waiter: Waiter) -> float:
    return waiter.since + BATCH_PATIENCE if waiter.claim.is_batch else waiter.since
