"""Times and durations as people write them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from llm_api_server.times import as_duration, as_utc, parse_duration, parse_end, parse_since

NOW = datetime(2026, 5, 10, 15, 30, tzinfo=UTC).timestamp()


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> float:
    return datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90", 90), ("45s", 45), ("90m", 5400), ("12h", 43200), ("2w", 1209600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5h", "3y", "9999999999d", "none"])
def test_malformed_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("12h", NOW + 43200),
        ("30d", NOW + 30 * 86400),
        ("2027-01-31", utc(2027, 1, 31)),
        ("2027-01-31T12:00", utc(2027, 1, 31, 12)),
        ("2027-01-31T12:00:00Z", utc(2027, 1, 31, 12)),
        ("2027-01-31T12:00:00+02:00", utc(2027, 1, 31, 10)),
        ("1800000000", 1800000000.0),
    ],
)
def test_future_times_are_absolute_or_count_from_now(text: str, end: float) -> None:
    assert parse_end(text, NOW) == end


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("2h", NOW - 7200),
        ("0d", utc(2026, 5, 10)),
        ("7d", utc(2026, 5, 3)),
        ("1w", utc(2026, 5, 3)),
        ("2026-05-01", utc(2026, 5, 1)),
        ("999999999w", 0.0),
    ],
)
def test_past_days_start_at_midnight(text: str, since: float) -> None:
    assert parse_since(text, NOW) == since


@pytest.mark.parametrize("text", ["", "soon", "2027-13-01", "31.01.2027", "12"])
def test_malformed_times_are_refused_with_the_allowed_forms(text: str) -> None:
    for parse in (parse_end, parse_since):
        with pytest.raises(ValueError, match="is not a time: give a time such as 2027-01-31"):
            parse(text, NOW)


@pytest.mark.parametrize("text", ["999999999w", "1960-01-01", "9999-12-31"])
def test_times_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        parse_end(text, NOW)


def test_times_are_shown_in_utc() -> None:
    assert as_utc(utc(2026, 5, 1, 6, 7)) == "2026-05-01 06:07:00Z"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3605, "1 h"),
        (3723, "1 h 2 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert as_duration(seconds) == text
