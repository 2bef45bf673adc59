"""Times and durations in the notation of the command line and of query parameters."""

from __future__ import annotations

import re
from datetime import UTC, datetime

HOUR = 3600
DAY = 86400
_UNITS = {"s": 1, "m": 60, "h": HOUR, "d": DAY, "w": 7 * DAY}
_DURATION = re.compile(r"(\d{1,9})([smhdw])")
_UNIX_SECONDS = re.compile(r"\d{9,11}(\.\d+)?")
_LAST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
_FORMS = "a time such as 2027-01-31 or 2027-01-31T12:00:00Z (UTC by default), a duration such as 30d, 12h or 90m"


def parse_duration(text: str) -> float:
    """Return the seconds of `90`, `45s`, `90m`, `12h`, `30d` or `2w`. Raises `ValueError` with a sentence."""
    match = _DURATION.fullmatch(text if text[-1:].isalpha() else f"{text}s")
    if match is None:
        raise ValueError(f"{text!r} is not a duration: give a number and s, m, h, d or w, such as 24h.")
    return float(int(match[1]) * _UNITS[match[2]])


def parse_end(text: str, now: float) -> float:
    """Return a future time in Unix seconds; a duration counts from `now`. Raises `ValueError` with a sentence."""
    match = _DURATION.fullmatch(text)
    return _within(now + parse_duration(text) if match else _parse_time(text), text)


def parse_since(text: str, now: float) -> float:
    """Return a past time in Unix seconds; a duration counts back from `now`, days and weeks from midnight (UTC).

    Raises `ValueError` with a sentence.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        return _within(_parse_time(text), text)
    at = max(0.0, now - parse_duration(text))
    return at // DAY * DAY if match[2] in "dw" else at


def as_utc(seconds: float) -> str:
    """Return a time such as `2027-01-31 12:00:00Z`."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%SZ}"


def as_duration(seconds: float) -> str:
    """Return the two largest units: `45 s`, `12 min 3 s`, `3 h 20 min`, `12 d 4 h`."""
    rest = max(0, int(seconds))
    parts = []
    for size, unit in ((DAY, "d"), (HOUR, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        parts.append((count, f"{count} {unit}"))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(text for count, text in parts[first : first + 2] if count) or parts[-1][1]


def _parse_time(text: str) -> float:
    if _UNIX_SECONDS.fullmatch(text):
        return float(text)
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a time: give {_FORMS} or Unix seconds.") from None


def _within(seconds: float, text: str) -> float:
    if not 0 <= seconds <= _LAST:
        raise ValueError(f"{text!r} is out of range: give a time from 1970 to 9998.")
    return seconds
