"""How a key stands, as OpenAI's headers. Pure."""

from __future__ import annotations

import math
from functools import lru_cache

from llm_api_server.control import Standing


def limit_lines(standing: Standing, requests: int = 0, tokens: int = 0) -> bytes:
    """Lines of a head; `requests` and `tokens` were used since. Times as OpenAI has them: `120ms`, `1s`, `6m0s`."""
    lines = b""
    if (quota := standing.requests) is not None:
        lines = (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
            b"x-ratelimit-reset-requests: %b\r\n"
            % (quota.limit, max(0, quota.remaining - requests), _duration(quota.reset))
        )
    if (quota := standing.tokens) is not None:
        lines += (
            b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\n"
            b"x-ratelimit-reset-tokens: %b\r\n"
            % (quota.limit, max(0, quota.remaining - tokens), _duration(quota.reset))
        )
    return lines


@lru_cache(1024)
def _duration(seconds: float) -> bytes:
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    minutes, rest = divmod(math.ceil(seconds), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
