"""Durations of the phases of a load, read from the engine's own log as it grows. Pure.

A mark that an engine (or its next version) does not write is no error: its time counts to the next phase.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

#: The phase before the process runs (the zygote's start included), and the phase after the last mark.
FIRST, LAST = "process", "warm_up"


class LoadTrace(msgspec.Struct, frozen=True):
    """The load of one instance, from its start until it was ready or failed. Unix seconds; `phases` in order."""

    instance: str
    model: str
    started_at: float
    ended_at: float
    phases: Mapping[str, float] = {}
    error: str | None = None


class LoadPhases:
    """`marks`: the phases in order, each with a pattern of the log line that ends it."""

    def __init__(self, marks: Sequence[tuple[str, str]], now: float) -> None:
        self._marks = [(name, re.compile(pattern)) for name, pattern in marks]
        self._phase_started_at = now
        self._partial_line = ""
        self.seconds: dict[str, float] = {}
        self.current = FIRST

    def on_started(self, now: float) -> None:
        """End the first phase: the process runs."""
        self._end(FIRST, now)

    def on_log(self, text: str, now: float) -> None:
        """Read more of the log; `text` may end within a line."""
        *lines, self._partial_line = (self._partial_line + text).split("\n")
        for line in lines:
            for index, (name, pattern) in enumerate(self._marks):
                if pattern.search(line):
                    del self._marks[: index + 1]
                    self._end(name, now)
                    break

    def on_ready(self, now: float) -> None:
        self._end(LAST, now)

    def _end(self, name: str, now: float) -> None:
        self.seconds[name] = round(now - self._phase_started_at, 3)
        self._phase_started_at = now
        self.current = self._marks[0][0] if self._marks else LAST


def describe(seconds: Mapping[str, float]) -> str:
    """Return for example `process 0.1 s, imports 7.9 s`."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items())
