"""Rate-limit headers as OpenAI writes them."""

from __future__ import annotations

import pytest

from llm_api_server.gateway.metering.ratelimit_headers import RateLimitHeaders, ratelimit_headers
from llm_api_server.ipc.quota_messages import RateLimit, RateLimits


def test_each_limit_has_three_lines() -> None:
    assert ratelimit_headers(RateLimits(requests=RateLimit(10, 0, 12.5))).splitlines() == [
        b"x-ratelimit-limit-requests: 10",
        b"x-ratelimit-remaining-requests: 0",
        b"x-ratelimit-reset-requests: 13s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, b"0ms"), (0.12, b"120ms"), (1, b"1s"), (59.2, b"1m0s"), (360, b"6m0s")]
)
def test_durations_look_as_openai_writes_them(seconds: float, text: bytes) -> None:
    assert ratelimit_headers(RateLimits(tokens=RateLimit(1, 1, seconds))).endswith(
        b"x-ratelimit-reset-tokens: " + text + b"\r\n"
    )


def test_later_use_lowers_what_remains_to_zero_at_least() -> None:
    headers = RateLimitHeaders(RateLimits(RateLimit(10, 3, 1), RateLimit(100, 50, 1)))
    assert headers.after(2, 20) == ratelimit_headers(RateLimits(RateLimit(10, 1, 1), RateLimit(100, 30, 1)))
    assert headers.after(4, 60) == ratelimit_headers(RateLimits(RateLimit(10, 0, 1), RateLimit(100, 0, 1)))
