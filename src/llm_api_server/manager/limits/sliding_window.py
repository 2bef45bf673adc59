"""A sum over a sliding window of one minute. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MINUTE = 60.0
#: Seconds that are counted together, so that a minute of any traffic takes few entries.
STEP = 0.1
#: Tolerance for rounding errors, so that a client that retries exactly in time is not early; far less than a step.
_ROUNDING = 1e-6


@dataclass
class Entry:
    """Amount counted within one step. `at` is the end of the step, so that the window never forgets too early."""

    at: float
    amount: int = 0


class SlidingWindow:
    """Sum over the last minute."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._total = 0

    def add(self, now: float, amount: int) -> Entry:
        """Count `amount` and return the entry that holds it until it leaves the window."""
        if not self._entries or self._entries[-1].at < now:
            self._entries.append(Entry(now + STEP))
        entry = self._entries[-1]
        self._change(entry, amount)
        return entry

    def change(self, now: float, entry: Entry, amount: int) -> None:
        """Add `amount`, which may be below zero, to an entry unless that has left the window."""
        self.total(now)
        if entry.at + MINUTE > now + _ROUNDING:
            self._change(entry, amount)

    def total(self, now: float) -> int:
        while self._entries and self._entries[0].at + MINUTE <= now + _ROUNDING:
            self._total -= self._entries.popleft().amount
        return self._total

    def free_in(self, now: float, amount: int) -> float:
        """Return the seconds until `amount` will have left the window."""
        left = amount
        for entry in self._entries:
            left -= entry.amount
            if left <= 0:
                return max(0.0, entry.at + MINUTE - now)
        return MINUTE

    def reset_in(self, now: float) -> float:
        """Return the seconds until the window is empty if nothing is added."""
        last = next((entry for entry in reversed(self._entries) if entry.amount), None)
        return max(0.0, last.at + MINUTE - now) if last else 0.0

    def entries(self, now: float) -> list[tuple[float, int]]:
        """Return the end of each step and the amount counted in it."""
        self.total(now)
        return [(entry.at, entry.amount) for entry in self._entries if entry.amount]

    def restore(self, entries: list[tuple[float, int]], now: float) -> None:
        """Restore the entries of an earlier process, before anything is counted here."""
        for at, amount in entries:
            if now - MINUTE < at <= now + STEP:
                self._entries.append(Entry(at))
                self._change(self._entries[-1], amount)

    def _change(self, entry: Entry, amount: int) -> None:
        entry.amount += amount
        self._total += amount
