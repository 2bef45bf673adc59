"""From the end of an engine's log to a sentence for the client: shared by the adapters' `explain_failure`. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

_PATH = re.compile(r"""(?<![\w:/.])(?:~|\.{1,2})?/(?:[^\s'"`,;:()<>\[\]]+/)*[^\s'"`,;:()<>\[\]]*""")
_LONGEST = 400

OUT_OF_MEMORY = "not enough memory"


def without_paths(text: str) -> str:
    """Paths replaced by their last part; text of any origin made one short line."""
    short = _PATH.sub(lambda match: match.group().rstrip("/").rsplit("/", 1)[-1] or "…", text)
    line = " ".join(short.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def first_match(patterns: Iterable[tuple[str, str]], text: str) -> str | None:
    """The sentence of the first pattern that is found, filled with the pattern's groups of its last find."""
    for pattern, sentence in patterns:
        found = None
        for found in re.finditer(pattern, text, re.MULTILINE):  # noqa: B007 - the last one is wanted
            pass
        if found is not None:
            return without_paths(found.expand(sentence))
    return None


def exit_reason(engine: str, exit_code: int | None) -> str:
    """What the exit code alone tells; a guard reports a signal as 128 plus its number."""
    if exit_code is None:
        return f"{engine} ended without saying why; see the model's log"
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number == signal.SIGKILL:
        return f"{engine} was killed, most likely because the machine ran out of memory"
    if number > 0 and number in set(signal.Signals):
        return f"{engine} crashed ({signal.Signals(number).name}); see the model's log"
    return f"{engine} ended with exit code {exit_code}; see the model's log"
