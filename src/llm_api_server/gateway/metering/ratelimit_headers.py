"""OpenAI's `x-ratelimit-*` headers. Pure."""

from __future__ import annotations

import math
from functools import lru_cache

from llm_api_server.ipc.quota_messages import RateLimit, RateLimits


class RateLimitHeaders:
    """Header lines for the state of a key's limits, and for the same state after further use.

    Durations are written as OpenAI writes them: `120ms`, `1s`, `6m0s`.
    """

    def __init__(self, rate_limits: RateLimits) -> None:
        self._requests = rate_limits.requests.remaining if rate_limits.requests is not None else None
        self._tokens = rate_limits.tokens.remaining if rate_limits.tokens is not None else None
        self._template = _template(b"requests", rate_limits.requests) + _template(b"tokens", rate_limits.tokens)

    def after(self, requests: int, tokens: int) -> bytes:
        """Return the lines after the further use of `requests` and `tokens`."""
        remaining = []
        if self._requests is not None:
            remaining.append(self._requests - requests if self._requests > requests else 0)
        if self._tokens is not None:
            remaining.append(self._tokens - tokens if self._tokens > tokens else 0)
        return self._template % tuple(remaining)


def ratelimit_headers(rate_limits: RateLimits) -> bytes:
    return RateLimitHeaders(rate_limits).after(0, 0)


def _template(unit: bytes, limit: RateLimit | None) -> bytes:
    """Return the lines with `%d` for what remains."""
    if limit is None:
        return b""
    lines = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %b\r\n"
    return lines % (unit, limit.limit, unit, unit, _duration(limit.reset))


@lru_cache(1024)
def _duration(seconds: float) -> bytes:
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    minutes, rest = divmod(math.ceil(seconds), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
