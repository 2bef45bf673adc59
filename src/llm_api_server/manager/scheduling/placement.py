"""Finds room for a model: free devices and places, or the fewest instances that have to go. Pure.

One `PlacementPass` is made for each pass of the scheduler and is charged with what the pass decides, so that what
was found for
one model is not given to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from llm_api_server.engines.base import NO_PLACEMENT, Need, Placement
from llm_api_server.manager.scheduling.memory import MemoryBudget, taken_by, tighter
from llm_api_server.manager.scheduling.state import Allocation, Model
from llm_api_server.types import ModelState

#: Among so many candidates the smallest set is looked for; among more, the first that are enough.
_MOST_COMBINED = 12


@dataclass(frozen=True)
class EvictionPlan:
    """`victims` leave, by sleep where `may_sleep`, and then the model goes to `placement`."""

    victims: tuple[Allocation, ...]
    placement: Placement
    may_sleep: bool


class PlacementPass:
    """`now` counts all that is there, `later` leaves out what is on its way out."""

    def __init__(self, empty: MemoryBudget, bookings: Iterable[Allocation], models: dict[str, Model]) -> None:
        self._models = models
        self._bookings = [booking for booking in bookings if models[booking.model].takes_place]
        self.now, self.later = empty.copy(), empty.copy()
        for booking in self._bookings:
            self.now.add(booking.takes, places=0 if booking.is_asleep else 1)
            keeps_place = not booking.is_leaving and booking.state is not ModelState.SLEEPING
            self.later.add(booking.will_take, places=1 if keeps_place else 0)
        self.victims: set[str] = set()

    def seats_now(self, model: Model) -> Placement | None:
        """Where it can start (or wake) at once without taking what others are to get."""
        return self._place(model, tighter(self.now, self.later))

    def seats_later(self, model: Model) -> Placement | None:
        """Where it can start when those have left that leave anyway."""
        return self._place(model, self.later)

    def is_blocked(self, model: Model, placement: Placement) -> bool:
        """Another start on these devices is under way, and one of the two measures free memory."""
        devices = {seat.device for seat in placement.devices}
        starting = [b for b in self._bookings if b.state is ModelState.STARTING]
        return any(
            not devices.isdisjoint(booking.awake_takes) and (_measures(model.need) or _measures(self._need(booking)))
            for booking in starting
        )

    def give(self, model: Model, placement: Placement, *, at_once: bool) -> None:
        """`placement` is the model's from now on (or from when it is free)."""
        if not model.takes_place:
            return
        before = model.booking.takes if model.booking is not None else {}
        for account in (self.now, self.later) if at_once else (self.later,):
            account.remove(before)
            account.add(taken_by(placement), places=1)

    def begin(self, model: Model) -> None:
        """Its start is under way from now on."""
        if model.booking is not None and model.booking not in self._bookings:
            self._bookings.append(model.booking)

    def evict(self, eviction: EvictionPlan) -> None:
        self.victims |= {booking.id for booking in eviction.victims}
        for booking in eviction.victims:
            _take_away(self.later, booking, may_sleep=eviction.may_sleep)

    def make(self, model: Model, candidates: Sequence[Allocation]) -> EvictionPlan | None:
        """The fewest of `candidates` (the best to go first) that make room; asleep if that is enough."""
        candidates = [booking for booking in candidates if booking.id not in self.victims]
        for may_sleep in (True, False):
            for chosen in _selections(candidates):
                account = self.later.copy()
                for booking in chosen:
                    _take_away(account, booking, may_sleep=may_sleep)
                if (placement := self._place(model, account)) is not None:
                    return EvictionPlan(tuple(chosen), placement, may_sleep)
        return None

    def _place(self, model: Model, account: MemoryBudget) -> Placement | None:
        if not model.takes_place:
            return NO_PLACEMENT
        booking = model.booking
        if booking is None or not booking.is_asleep:
            return account.place(model.need)
        more = {device: size - booking.takes.get(device, 0) for device, size in booking.awake_takes.items()}
        return booking.placement if account.fits(more) else None

    def _need(self, booking: Allocation) -> Need | None:
        return self._models[booking.model].need


def _selections(candidates: Sequence[Allocation]) -> Iterable[Sequence[Allocation]]:
    cheapest = candidates[:_MOST_COMBINED]
    for size in range(1, len(cheapest) + 1):
        yield from combinations(cheapest, size)
    for size in range(len(cheapest) + 1, len(candidates) + 1):
        yield candidates[:size]


def _take_away(account: MemoryBudget, booking: Allocation, *, may_sleep: bool) -> None:
    is_asleep = booking.state is ModelState.SLEEPING
    account.remove(booking.will_take, places=0 if is_asleep else 1)
    if may_sleep and booking.asleep is not None and not is_asleep:
        account.add(booking.asleep_takes(2))


def _measures(need: Need | None) -> bool:
    return need is not None and need.measures_memory
