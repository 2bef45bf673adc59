"""How long the phases of a load take, read from the engine's own log as it grows. Pure; the instance's task feeds it.

Marks that an engine (or its next version) does not write are no error: their time then counts to the next phase.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Before the process exists (the zygote's start included), and after the last mark.
FIRST, LAST = "process", "warm_up"


class LoadPhases:
    """`marks`: in order, the name of a phase and what the log says when it is over."""

    def __init__(self, marks: Sequence[tuple[str, str]], now: float) -> None:
        self._marks = [(name, re.compile(pattern)) for name, pattern in marks]
        self._since = now
        self._rest = ""
        self.seconds: dict[str, float] = {}
        self.current = FIRST

    def on_started(self, now: float) -> None:
        """The process runs."""
        self._end(FIRST, now)
        self._go_on()

    def on_log(self, text: str, now: float) -> None:
        """More of the log; lines may come in pieces."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            for index, (name, pattern) in enumerate(self._marks):
                if pattern.search(line):
                    self._end(name, now)
                    del self._marks[: index + 1]
                    self._go_on()
                    break

    def on_ready(self, now: float) -> None:
        self._end(LAST, now)

    def _go_on(self) -> None:
        self.current = self._marks[0][0] if self._marks else LAST

    def _end(self, name: str, now: float) -> None:
        self.seconds[name] = round(now - self._since, 3)
        self._since = now


def describe(seconds: dict[str, float]) -> str:
    """`process 0.1 s, imports 7.9 s`"""
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items())
