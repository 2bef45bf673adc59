"""How a key stands, as OpenAI's headers. Pure."""

from __future__ import annotations

import math
from functools import lru_cache

from llm_api_server.ipc.quota_messages import RateLimit, RateLimits


class RateLimitHeaders:
    """Lines of a head, for one standing and what is used since. Times as OpenAI has them: `120ms`, `1s`, `6m0s`."""

    def __init__(self, standing: RateLimits) -> None:
        self._requests = standing.requests.remaining if standing.requests is not None else None
        self._tokens = standing.tokens.remaining if standing.tokens is not None else None
        self._form = _form(b"requests", standing.requests) + _form(b"tokens", standing.tokens)

    def after(self, requests: int, tokens: int) -> bytes:
        """`requests` and `tokens` were used since."""
        left = []
        if self._requests is not None:
            left.append(self._requests - requests if self._requests > requests else 0)
        if self._tokens is not None:
            left.append(self._tokens - tokens if self._tokens > tokens else 0)
        return self._form % tuple(left)


def ratelimit_headers(standing: RateLimits) -> bytes:
    return RateLimitHeaders(standing).after(0, 0)


def _form(what: bytes, quota: RateLimit | None) -> bytes:
    """With a place for what remains."""
    if quota is None:
        return b""
    lines = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %b\r\n"
    return lines % (what, quota.limit, what, what, _duration(quota.reset))


@lru_cache(1024)
def _duration(seconds: float) -> bytes:
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    minutes, rest = divmod(math.ceil(seconds), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
