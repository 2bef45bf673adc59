"""Quota that the manager has granted this worker in advance, so that it admits requests without a round trip. Pure."""

from __future__ import annotations

from llm_api_server.auth.access import Limits
from llm_api_server.gateway.metering.ratelimit_headers import RateLimitHeaders
from llm_api_server.ipc.quota_messages import NO_GRANT, QuotaGrant, RateLimits, ReportQuota


class HeldQuota:
    """Quota of one key. Requests take from what is free; the next report to the manager has what was used.

    Once `is_revoked`, nothing more is taken, and the owner returns whatever becomes free at once.
    """

    def __init__(self, key_id: str, limits: Limits) -> None:
        self.key_id = key_id
        self.limits = limits
        self.is_revoked = False
        self._limits_requests = limits.requests_per_minute is not None
        self._limits_concurrent = limits.max_concurrent is not None
        self._limits_tokens = any(
            limit is not None for limit in (limits.tokens_per_minute, limits.tokens_per_day, limits.tokens_per_month)
        )
        self._requests = self._tokens = self._concurrent = 0
        self._used_requests = self._used_tokens = 0
        self._running = 0
        self._was_used = True
        self._headers = RateLimitHeaders(RateLimits())
        # Use since the manager's last rate limits of the key, which count the whole grant as used.
        self._requests_since = self._tokens_since = 0

    def add(self, grant: QuotaGrant, rate_limits: RateLimits) -> None:
        """Add a grant. `rate_limits` do not count it yet."""
        self.is_revoked = False
        self.update(rate_limits)
        self._requests += grant.requests
        self._tokens += grant.tokens
        self._concurrent += grant.concurrent

    def update(self, rate_limits: RateLimits) -> None:
        """Apply the manager's rate limits of the key, which count all that is held here as used."""
        self._headers = RateLimitHeaders(rate_limits)
        self._requests_since, self._tokens_since = -self._requests, -self._tokens

    def take(self, tokens: int) -> bytes | None:
        """Admit a request that reserves `tokens`; return its rate-limit headers, or None if too little is free."""
        if (
            self.is_revoked
            or (self._limits_requests and self._requests < 1)
            or (self._limits_concurrent and self._concurrent < 1)
            or (self._limits_tokens and self._tokens < tokens)
        ):
            return None
        if self._limits_requests:
            self._requests -= 1
        if self._limits_concurrent:
            self._concurrent -= 1
        if self._limits_tokens:
            self._tokens -= tokens
        self._used_requests += 1
        self._running += 1
        self._requests_since += 1
        self._tokens_since += tokens
        return self._headers.after(self._requests_since, self._tokens_since)

    def settle(self, reserved: int, used: int) -> None:
        """End a request that was taken: it reserved `reserved` tokens and used `used`."""
        self._running -= 1
        if self._limits_concurrent:
            self._concurrent += 1
        if self._limits_tokens:
            self._tokens += reserved - used
        self._used_tokens += used
        self._tokens_since += used - reserved

    def headers(self) -> bytes:
        """Rate-limit headers as far as this worker knows. Quota of other workers counts as used."""
        return self._headers.after(self._requests_since, self._tokens_since)

    def report(self, *, returns: bool, is_reply: bool = False) -> ReportQuota | None:
        """Return what was used since the last report; None if there is nothing to report.

        With `returns` all free quota goes back to the manager.
        """
        requests = self._used_requests if self._limits_requests else 0
        tokens = self._used_tokens if self._limits_tokens else 0
        self._was_used = self._used_requests > 0 or self._used_tokens > 0
        returned = NO_GRANT
        if returns:
            returned = QuotaGrant(self._requests, self._tokens, self._concurrent)
            self._requests = self._tokens = self._concurrent = 0
        self._used_requests = self._used_tokens = 0
        if not (requests or tokens or is_reply or returned != NO_GRANT):
            return None
        return ReportQuota(self.key_id, requests, tokens, returned, is_reply)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing has used it since the report before the last, and nothing runs on it."""
        return self._running == 0 and not self._was_used and not self._used_requests

    @property
    def is_running(self) -> bool:
        """Return whether a request that took from it has not ended, so that quota may still become free."""
        return self._running > 0
