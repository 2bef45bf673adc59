"""The arithmetic of limits: never more than a limit, and all of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.auth.access import Limits
from llm_api_server.manager.limits.key_quota import KeyQuota, Refusal, Reservation
from llm_api_server.manager.limits.sliding_window import MINUTE

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


def admit(
    quota: KeyQuota, limits: Limits, now: float, tokens: int = 0, optional_tokens: int = 0
) -> Reservation | Refusal:
    return quota.admit("k", limits, tokens, optional_tokens, now, NOON + now)


def refused(found: Reservation | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


def admitted(found: Reservation | Refusal) -> Reservation:
    assert isinstance(found, Reservation)
    return found


def test_the_limit_of_requests_per_minute_is_exact() -> None:
    quota, limits = KeyQuota(), Limits(requests_per_minute=5)
    for second in range(5):
        admitted(admit(quota, limits, float(second)))
    found = refused(admit(quota, limits, 5.0))
    assert (found.code, found.should_retry) == ("rate_limit_exceeded", None)
    assert "5 requests per minute" in found.message
    assert found.retry_after == pytest.approx(55.1)
    refused(admit(quota, limits, 5.0 + found.retry_after - 0.01))
    admitted(admit(quota, limits, 5.0 + found.retry_after))


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
    st.integers(1, 5),
)
def test_no_minute_has_more_than_the_limit_and_retrying_as_told_succeeds(gaps: list[float], most: int) -> None:
    quota, limits, now = KeyQuota(), Limits(requests_per_minute=most), 0.0
    passed: list[float] = []
    for gap in gaps:
        now += gap
        found = admit(quota, limits, now)
        if isinstance(found, Refusal):
            assert len([at for at in passed if at > now - MINUTE - 0.1]) >= most
            now += found.retry_after
            admitted(admit(quota, limits, now))
        passed.append(now)
    for first, last in zip(passed, passed[most:], strict=False):
        assert last - first >= MINUTE


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 80), st.integers(0, 80), st.integers(0, 160)), max_size=50))
def test_tokens_a_minute_are_exceeded_only_by_what_a_request_used_beyond_its_reservation(
    steps: list[tuple[float, int, int, int]],
) -> None:
    quota, limits, now = KeyQuota(), Limits(tokens_per_minute=100), 0.0
    running: list[tuple[Reservation, int]] = []
    for gap, tokens, optional_tokens, used in steps:
        now += gap
        found = admit(quota, limits, now, tokens, optional_tokens)
        if isinstance(found, Reservation):
            assert tokens <= found.tokens <= tokens + optional_tokens
            running.append((found, used))
            assert quota.tokens.total(now) <= 100
        elif running:
            reservation, spent = running.pop(0)
            quota.settle(reservation, min(spent, reservation.tokens), now, NOON + now)
            assert quota.tokens.total(now) <= 100


def test_unused_reserved_tokens_are_given_back() -> None:
    quota, limits = KeyQuota(), Limits(tokens_per_minute=100)
    first = admitted(admit(quota, limits, 0.0, tokens=10, optional_tokens=500))
    assert first.tokens == 100
    refused(admit(quota, limits, 1.0, tokens=10))
    quota.settle(first, 30, 2.0, NOON)
    second = admitted(admit(quota, limits, 2.0, tokens=10, optional_tokens=500))
    assert second.tokens == 70
    quota.settle(second, 200, 3.0, NOON)
    assert "100 tokens per minute" in refused(admit(quota, limits, 4.0, tokens=1)).message


def test_a_request_larger_than_the_limit_should_not_be_retried() -> None:
    found = refused(admit(KeyQuota(), Limits(tokens_per_minute=100), 0.0, tokens=101))
    assert found.should_retry is False
    assert "max_tokens" in found.message


def test_settling_a_request_that_has_left_the_minute_changes_nothing() -> None:
    quota, limits = KeyQuota(), Limits(tokens_per_minute=100)
    first = admitted(admit(quota, limits, 0.0, tokens=100))
    second = admitted(admit(quota, limits, 70.0, tokens=60))
    quota.settle(first, 10, 80.0, NOON)
    quota.settle(second, 60, 80.0, NOON)
    assert quota.tokens.total(80.0) == 60


def test_concurrent_requests_are_limited_until_one_ends() -> None:
    quota, limits = KeyQuota(), Limits(max_concurrent=2)
    first = admitted(admit(quota, limits, 0.0))
    admitted(admit(quota, limits, 0.0))
    found = refused(admit(quota, limits, 0.0))
    assert "concurrent" in found.message
    quota.settle(first, 0, 1.0, NOON)
    admitted(admit(quota, limits, 1.0))
    refused(admit(quota, limits, 1.0))


def test_refused_requests_are_not_counted() -> None:
    quota, limits = KeyQuota(), Limits(requests_per_minute=2, max_concurrent=1, tokens_per_minute=100)
    first = admitted(admit(quota, limits, 0.0, tokens=50))
    for _ in range(5):
        refused(admit(quota, limits, 0.0, tokens=50))
    quota.settle(first, 50, 1.0, NOON)
    refused(admit(quota, limits, 1.0, tokens=51))
    admitted(admit(quota, limits, 1.0, tokens=50))


def test_budgets_of_day_and_month_count_running_requests_and_begin_anew() -> None:
    quota, limits = KeyQuota(), Limits(tokens_per_day=100, tokens_per_month=150)
    quota.add_spent(20, 20, NOON)
    first = admitted(admit(quota, limits, 0.0, tokens=50, optional_tokens=1000))
    assert first.tokens == 80
    found = refused(admit(quota, limits, 0.0, tokens=1))
    assert (found.code, found.should_retry) == ("insufficient_quota", False)
    assert "100 tokens per day" in found.message
    assert found.retry_after == 12 * 3600
    quota.settle(first, 80, 1.0, NOON)
    refused(admit(quota, limits, 2.0))
    tomorrow = 13 * 3600.0
    second = admitted(admit(quota, limits, tomorrow, tokens=10, optional_tokens=1000))
    assert second.tokens == 50
    quota.settle(second, 50, tomorrow, NOON + tomorrow)
    found = refused(admit(quota, limits, tomorrow, tokens=1))
    assert "150 tokens per month" in found.message
    assert found.retry_after == 8 * 86400 - 13 * 3600 + 12 * 3600
    admitted(admit(quota, limits, 9 * 86400.0, tokens=1))


def test_a_request_admitted_by_another_manager_counts_until_it_is_settled() -> None:
    quota, limits = KeyQuota(), Limits(max_concurrent=1, tokens_per_day=100)
    restored = quota.restore(60)
    refused(admit(quota, limits, 0.0))
    assert quota.reserved == 60
    quota.settle(restored, 40, 1.0, NOON)
    assert admitted(admit(quota, limits, 1.0, tokens=60)).tokens == 60
    assert quota.spent.of_day == 40


def test_a_quota_is_idle_only_once_the_store_has_all_of_it() -> None:
    quota, limits = KeyQuota(), Limits(tokens_per_day=100)
    first = admitted(admit(quota, limits, 0.0, tokens=10))
    assert not quota.is_idle(1000.0)
    quota.settle(first, 10, 1000.0, NOON)
    assert not quota.is_idle(1001.0)
    assert quota.is_idle(1061.0)


def test_rate_limits_have_what_remains_and_the_time_of_the_reset() -> None:
    quota, limits = KeyQuota(), Limits(requests_per_minute=3, tokens_per_minute=100)
    rate_limits = quota.rate_limits(limits, 0.0)
    assert rate_limits.requests is not None
    assert (rate_limits.requests.remaining, rate_limits.requests.reset) == (3, 0)
    admit(quota, limits, 0.0, tokens=40)
    admit(quota, limits, 10.0, tokens=10)
    rate_limits = quota.rate_limits(limits, 20.0)
    assert rate_limits.requests is not None
    assert rate_limits.tokens is not None
    assert (rate_limits.requests.remaining, rate_limits.tokens.remaining) == (1, 50)
    assert rate_limits.requests.reset == rate_limits.tokens.reset == pytest.approx(50.1)
    assert quota.rate_limits(Limits(), 20.0).requests is None
