"""Reasons for the failure of an engine, from its exit code and the end of its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

_PATH = re.compile(r"""(?<![\w:/.])(?:~|\.{1,2})?/(?:[^\s'"`,;:()<>\[\]]+/)*[^\s'"`,;:()<>\[\]]*""")
_MAX_CHARS = 400

OUT_OF_MEMORY = "not enough memory"


def without_paths(text: str) -> str:
    """Return `text` as one short line, with each path reduced to its last part."""
    short = _PATH.sub(lambda match: match.group().rstrip("/").rsplit("/", 1)[-1] or "…", text)
    line = " ".join(short.split())
    return line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 1] + "…"


def first_match(patterns: Iterable[tuple[str, str]], text: str) -> str | None:
    """Return the sentence of the first pattern found, filled with the groups of its last match."""
    for pattern, sentence in patterns:
        last = None
        for last in re.finditer(pattern, text, re.MULTILINE):  # noqa: B007 - only the last match counts
            pass
        if last is not None:
            return without_paths(last.expand(sentence))
    return None


def exit_reason(engine: str, exit_code: int | None) -> str:
    """Return the reason an exit code gives; a guard reports a signal as 128 plus its number."""
    if exit_code is None:
        return f"{engine} ended without giving a reason; see the model's log"
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number == signal.SIGKILL:
        return f"{engine} was killed, most likely because the machine ran out of memory"
    if number > 0 and number in set(signal.Signals):
        return f"{engine} crashed ({signal.Signals(number).name}); see the model's log"
    return f"{engine} ended with exit code {exit_code}; see the model's log"
