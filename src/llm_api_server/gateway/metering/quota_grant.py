"""What a worker may admit by itself: its share of a key's limits, while these are far. Pure; `accounts.py` uses it."""

from __future__ import annotations

from llm_api_server.auth.access import Limits
from llm_api_server.gateway.metering.ratelimit_headers import RateLimitHeaders
from llm_api_server.ipc.quota_messages import NO_GRANT, QuotaGrant, RateLimits, ReportQuota


class HeldQuota:
    """Of one key. What is free can be taken; what was used is told with the next `spend`.

    `is_recalled`: nothing more is taken, and what gets free goes back at once.
    """

    def __init__(self, key_id: str, limits: Limits) -> None:
        self.key_id = key_id
        self.limits = limits
        self.is_recalled = False
        self._needs_request = limits.requests_per_minute is not None
        self._needs_place = limits.max_concurrent is not None
        per_minute = limits.tokens_per_minute
        self._needs_tokens = (per_minute, limits.tokens_per_day, limits.tokens_per_month) != (None, None, None)
        self._requests = self._tokens = self._places = 0
        self._used_requests = self._used_tokens = 0
        self._running = 0
        self._was_used = True
        self._form = RateLimitHeaders(RateLimits())
        self._since = self._tokens_since = 0

    def add(self, share: QuotaGrant, standing: RateLimits) -> None:
        """More of it, and how the key stood before."""
        self.is_recalled = False
        self.hear(standing)
        self._requests += share.requests
        self._tokens += share.tokens
        self._places += share.concurrent

    def hear(self, standing: RateLimits) -> None:
        """How the key stands to the manager: all that is here counts as used there."""
        self._form = RateLimitHeaders(standing)
        self._since, self._tokens_since = -self._requests, -self._tokens

    def take(self, tokens: int) -> bytes | None:
        """Admit a request that may use `tokens`: its `lines`. None: the manager must decide."""
        if (
            self.is_recalled
            or (self._needs_request and self._requests < 1)
            or (self._needs_place and self._places < 1)
            or (self._needs_tokens and self._tokens < tokens)
        ):
            return None
        if self._needs_request:
            self._requests -= 1
        if self._needs_place:
            self._places -= 1
        if self._needs_tokens:
            self._tokens -= tokens
        self._used_requests += 1
        self._running += 1
        self._since += 1
        self._tokens_since += tokens
        return self._form.after(self._since, self._tokens_since)

    def settle(self, reserved: int, used: int) -> None:
        """One of those that were taken is over."""
        self._running -= 1
        if self._needs_place:
            self._places += 1
        if self._needs_tokens:
            self._tokens += reserved - used
        self._used_tokens += used
        self._tokens_since += used - reserved

    def lines(self) -> bytes:
        """How the key stands as far as this worker knows: not better than it is, for others may hold shares, too."""
        return self._form.after(self._since, self._tokens_since)

    def spend(self, *, returns: bool, is_answer: bool = False) -> ReportQuota | None:
        """What to tell the manager; with `returns` all that is free goes back. None: nothing has happened."""
        requests = self._used_requests if self._needs_request else 0
        tokens = self._used_tokens if self._needs_tokens else 0
        self._was_used = self._used_requests > 0 or self._used_tokens > 0
        back = NO_GRANT
        if returns:
            back = QuotaGrant(self._requests, self._tokens, self._places)
            self._requests = self._tokens = self._places = 0
        self._used_requests = self._used_tokens = 0
        if not (requests or tokens or is_answer or back != NO_GRANT):
            return None
        return ReportQuota(self.key_id, requests, tokens, back, is_answer)

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and nothing had happened when it was last asked what to tell."""
        return self._running == 0 and not self._was_used and not self._used_requests

    @property
    def is_empty(self) -> bool:
        """Nothing is left that could get free."""
        return self._running == 0
