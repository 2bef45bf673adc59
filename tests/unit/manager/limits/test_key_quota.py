"""Limits, by their own arithmetic: never more than they say, and all that they say."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.auth.access import Limits
from llm_api_server.manager.limits.key_quota import MINUTE, KeyQuota, Refusal, Reservation, Window

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


def admit(account: KeyQuota, limits: Limits, now: float, tokens: int = 0, spare: int = 0) -> Reservation | Refusal:
    return account.admit("k", limits, (tokens, spare), now, NOON + now)


def refused(found: Reservation | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


def admitted(found: Reservation | Refusal) -> Reservation:
    assert isinstance(found, Reservation)
    return found


def test_n_requests_a_minute_and_not_one_more() -> None:
    account, limits = KeyQuota(), Limits(requests_per_minute=5)
    for second in range(5):
        admitted(admit(account, limits, float(second)))
    found = refused(admit(account, limits, 5.0))
    assert (found.code, found.should_retry) == ("rate_limit_exceeded", None)
    assert "5 requests per minute" in found.message
    assert found.retry_after == pytest.approx(55.1)
    refused(admit(account, limits, 5.0 + found.retry_after - 0.01))
    admitted(admit(account, limits, 5.0 + found.retry_after))


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
    st.integers(1, 5),
)
def test_no_minute_has_more_than_the_limit_and_waiting_as_told_helps(gaps: list[float], most: int) -> None:
    account, limits, now = KeyQuota(), Limits(requests_per_minute=most), 0.0
    passed: list[float] = []
    for gap in gaps:
        now += gap
        found = admit(account, limits, now)
        if isinstance(found, Refusal):
            assert len([at for at in passed if at > now - MINUTE - 0.1]) >= most
            now += found.retry_after
            admitted(admit(account, limits, now))
        passed.append(now)
    for first, last in zip(passed, passed[most:], strict=False):
        assert last - first >= MINUTE


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 80), st.integers(0, 80), st.integers(0, 160)), max_size=50))
def test_tokens_a_minute_are_exceeded_only_by_what_a_request_used_beyond_its_reservation(
    steps: list[tuple[float, int, int, int]],
) -> None:
    account, limits, now = KeyQuota(), Limits(tokens_per_minute=100), 0.0
    running: list[tuple[Reservation, int]] = []
    for gap, tokens, spare, used in steps:
        now += gap
        found = admit(account, limits, now, tokens, spare)
        if isinstance(found, Reservation):
            assert tokens <= found.tokens <= tokens + spare
            running.append((found, used))
            assert account.tokens.total(now) <= 100
        elif running:
            reservation, spent = running.pop(0)
            account.settle(reservation, min(spent, reservation.tokens), now, NOON + now)
            assert account.tokens.total(now) <= 100


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    account, limits = KeyQuota(), Limits(tokens_per_minute=100)
    first = admitted(admit(account, limits, 0.0, tokens=10, spare=500))
    assert first.tokens == 100
    refused(admit(account, limits, 1.0, tokens=10))
    account.settle(first, 30, 2.0, NOON)
    second = admitted(admit(account, limits, 2.0, tokens=10, spare=500))
    assert second.tokens == 70
    account.settle(second, 200, 3.0, NOON)
    assert "100 tokens per minute" in refused(admit(account, limits, 4.0, tokens=1)).message


def test_a_request_that_is_larger_than_the_limit_is_told_so() -> None:
    found = refused(admit(KeyQuota(), Limits(tokens_per_minute=100), 0.0, tokens=101))
    assert found.should_retry is False
    assert "max_tokens" in found.message


def test_late_settlement_of_a_request_that_has_left_the_minute_changes_nothing() -> None:
    account, limits = KeyQuota(), Limits(tokens_per_minute=100)
    first = admitted(admit(account, limits, 0.0, tokens=100))
    second = admitted(admit(account, limits, 70.0, tokens=60))
    account.settle(first, 10, 80.0, NOON)
    account.settle(second, 60, 80.0, NOON)
    assert account.tokens.total(80.0) == 60


def test_concurrent_requests() -> None:
    account, limits = KeyQuota(), Limits(max_concurrent=2)
    first = admitted(admit(account, limits, 0.0))
    admitted(admit(account, limits, 0.0))
    found = refused(admit(account, limits, 0.0))
    assert "concurrent" in found.message
    account.settle(first, 0, 1.0, NOON)
    admitted(admit(account, limits, 1.0))
    refused(admit(account, limits, 1.0))


def test_refused_requests_are_not_counted() -> None:
    account, limits = KeyQuota(), Limits(requests_per_minute=2, max_concurrent=1, tokens_per_minute=100)
    first = admitted(admit(account, limits, 0.0, tokens=50))
    for _ in range(5):
        refused(admit(account, limits, 0.0, tokens=50))
    account.settle(first, 50, 1.0, NOON)
    refused(admit(account, limits, 1.0, tokens=51))
    admitted(admit(account, limits, 1.0, tokens=50))


def test_budgets_of_day_and_month_count_running_requests_and_begin_anew() -> None:
    account, limits = KeyQuota(), Limits(tokens_per_day=100, tokens_per_month=150)
    account.add_spent(20, 20, NOON)
    first = admitted(admit(account, limits, 0.0, tokens=50, spare=1000))
    assert first.tokens == 80
    found = refused(admit(account, limits, 0.0, tokens=1))
    assert (found.code, found.should_retry) == ("insufficient_quota", False)
    assert "100 tokens per day" in found.message
    assert found.retry_after == 12 * 3600
    account.settle(first, 80, 1.0, NOON)
    refused(admit(account, limits, 2.0))
    tomorrow = 13 * 3600.0
    second = admitted(admit(account, limits, tomorrow, tokens=10, spare=1000))
    assert second.tokens == 50
    account.settle(second, 50, tomorrow, NOON + tomorrow)
    found = refused(admit(account, limits, tomorrow, tokens=1))
    assert "150 tokens per month" in found.message
    assert found.retry_after == 8 * 86400 - 13 * 3600 + 12 * 3600
    admitted(admit(account, limits, 9 * 86400.0, tokens=1))


def test_a_request_admitted_by_another_manager_counts_until_it_is_settled() -> None:
    account, limits = KeyQuota(), Limits(max_concurrent=1, tokens_per_day=100)
    restored = account.restore(60)
    refused(admit(account, limits, 0.0))
    assert account.reserved == 60
    account.settle(restored, 40, 1.0, NOON)
    assert admitted(admit(account, limits, 1.0, tokens=60)).tokens == 60
    assert account.spent.of_day == 40


def test_an_account_is_forgotten_only_when_the_store_knows_all_of_it() -> None:
    account, limits = KeyQuota(), Limits(tokens_per_day=100)
    first = admitted(admit(account, limits, 0.0, tokens=10))
    assert not account.is_idle(1000.0)
    account.settle(first, 10, 1000.0, NOON)
    assert not account.is_idle(1001.0)
    assert account.is_idle(1061.0)


def test_standing_tells_what_is_left_and_when_all_of_it_is_back() -> None:
    account, limits = KeyQuota(), Limits(requests_per_minute=3, tokens_per_minute=100)
    standing = account.standing(limits, 0.0)
    assert standing.requests is not None
    assert (standing.requests.remaining, standing.requests.reset) == (3, 0)
    admit(account, limits, 0.0, tokens=40)
    admit(account, limits, 10.0, tokens=10)
    standing = account.standing(limits, 20.0)
    assert standing.requests is not None
    assert standing.tokens is not None
    assert (standing.requests.remaining, standing.tokens.remaining) == (1, 50)
    assert standing.requests.reset == standing.tokens.reset == pytest.approx(50.1)
    assert account.standing(Limits(), 20.0).requests is None


def test_a_busy_minute_takes_few_entries() -> None:
    window = Window()
    for step in range(100_000):
        window.add(step / 1000, 1)
    assert len(window._entries) <= 1000
    window.total(99.999)
    assert len(window._entries) <= 601
    assert all(first.at < second.at for first, second in pairwise(window._entries))
