"""Quota of a key: what it has used and may still use, counted for all workers. Pure: time is an argument.

Requests and tokens per minute hold in any 60 seconds; budgets are for days and months of UTC. A request reserves the
tokens it may need when it is admitted, and what it did not use is given back when it is settled.

Quota granted to a worker in advance counts as used from the moment it is granted. What was used of it counts in the
minute from the moment the worker reports it, which is later than it was: a limit may refuse a moment too long, and
never admits one request too many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from llm_api_server.auth.access import Limits
from llm_api_server.ipc.quota_messages import NO_GRANT, QuotaGrant, RateLimit, RateLimits
from llm_api_server.manager.limits.sliding_window import MINUTE, Entry, SlidingWindow

#: Seconds to retry after for `max_concurrent`: when a request will end is not known.
_RETRY_CONCURRENT = 1.0
#: A worker is granted at most this part of what is left, so that other workers find some.
_GRANT_PARTS = 8
#: Requests of one grant at most: more than a worker uses in moments is not needed.
_MAX_GRANTED_REQUESTS = 256
#: A smaller grant is not worth its messages.
_MIN_GRANTED_REQUESTS = 2

#: What a key used in the last minute: ends of steps and amounts, first of requests, then of tokens.
Used = tuple[list[tuple[float, int]], list[tuple[float, int]]]


@dataclass(frozen=True)
class Refusal:
    """`limit` is a field of `Limits`. `should_retry` is False where waiting a little does not help."""

    limit: str
    code: str
    message: str
    retry_after: float
    should_retry: bool | None = None


@dataclass
class _Spent:
    """Tokens of the current day and month."""

    day: str = ""
    month: str = ""
    of_day: int = 0
    of_month: int = 0

    def roll_over(self, wall: float) -> None:
        """Begin anew if a day or month has begun."""
        today = datetime.fromtimestamp(wall, UTC)
        day, month = today.strftime("%Y-%m-%d"), today.strftime("%Y-%m")
        if day != self.day:
            self.day, self.of_day = day, 0
        if month != self.month:
            self.month, self.of_month = month, 0


@dataclass
class Reservation:
    """Tokens held by one admitted request, and their entry in the window of the last minute."""

    tokens: int
    entry: Entry | None


@dataclass
class KeyQuota:
    """Quota of one key. `now` is a monotonic clock, `wall` Unix time; both in seconds.

    `running` and `reserved` include what is granted to workers.
    """

    requests: SlidingWindow = field(default_factory=SlidingWindow)
    tokens: SlidingWindow = field(default_factory=SlidingWindow)
    running: int = 0
    reserved: int = 0
    granted_requests: int = 0
    granted_tokens: int = 0
    spent: _Spent = field(default_factory=_Spent)
    settled_at: float = float("-inf")

    def add_spent(self, of_day: int, of_month: int, wall: float) -> None:
        """Count tokens that were used before this manager counted."""
        self.spent.roll_over(wall)
        self.spent.of_day += of_day
        self.spent.of_month += of_month

    def admit(
        self, name: str, limits: Limits, tokens: int, optional_tokens: int, now: float, wall: float
    ) -> Reservation | Refusal:
        """Admit a request that needs `tokens`, and reserve up to `optional_tokens` more if the limits leave them."""
        self.spent.roll_over(wall)
        refusal = self._refuse_request(name, limits, now) or self._refuse_tokens(name, limits, tokens, now, wall)
        if refusal is not None:
            return refusal
        left = self._tokens_left(limits, now)
        wanted = tokens + optional_tokens
        reserved = wanted if left is None else max(tokens, min(wanted, left))
        self.running += 1
        self.reserved += reserved
        if limits.requests_per_minute is not None:
            self.requests.add(now, 1)
        entry = self.tokens.add(now, reserved) if limits.tokens_per_minute is not None else None
        return Reservation(reserved, entry)

    def settle(self, reservation: Reservation, used: int, now: float, wall: float) -> None:
        """End an admitted request that used `used` tokens."""
        self.spent.roll_over(wall)
        self.settled_at = now
        self.running -= 1
        self.reserved -= reservation.tokens
        self.spent.of_day += used
        self.spent.of_month += used
        if reservation.entry is not None:
            self.tokens.change(now, reservation.entry, used - reservation.tokens)

    def restore(self, tokens: int) -> Reservation:
        """Count a request that an earlier manager admitted: it is running, and reserves its tokens in the budgets."""
        self.running += 1
        self.reserved += tokens
        return Reservation(tokens, None)

    def used(self, now: float) -> Used:
        return self.requests.entries(now), self.tokens.entries(now)

    def restore_used(self, used: Used, now: float) -> None:
        """Count what an earlier manager counted in the last minute."""
        self.requests.restore(used[0], now)
        self.tokens.restore(used[1], now)

    def grant(self, limits: Limits, tokens: int, now: float) -> QuotaGrant:
        """Grant quota to a worker whose requests take about `tokens` each; none if a limit is near."""
        counts = [_MAX_GRANTED_REQUESTS]
        requests, concurrent = limits.requests_per_minute, limits.max_concurrent
        left = self._tokens_left(limits, now)
        if requests is not None:
            counts.append((requests - self._requests(now)) // _GRANT_PARTS)
        if concurrent is not None:
            counts.append((concurrent - self.running) // _GRANT_PARTS)
        if left is not None:
            counts.append(left // _GRANT_PARTS // max(1, tokens))
        count = min(counts)
        if count < _MIN_GRANTED_REQUESTS:
            return NO_GRANT
        grant = QuotaGrant(
            requests=count if requests is not None else 0,
            tokens=count * tokens if left is not None else 0,
            concurrent=count if concurrent is not None else 0,
        )
        self.granted_requests += grant.requests
        self.granted_tokens += grant.tokens
        self.reserved += grant.tokens
        self.running += grant.concurrent
        return grant

    def report(self, limits: Limits, requests: int, tokens: int, returned: QuotaGrant, now: float, wall: float) -> None:
        """Count what a worker used of its grants, and take back what it returns."""
        self.spent.roll_over(wall)
        self.settled_at = now
        self.granted_requests -= requests + returned.requests
        self.granted_tokens -= tokens + returned.tokens
        self.reserved -= tokens + returned.tokens
        self.running -= returned.concurrent
        self.spent.of_day += tokens
        self.spent.of_month += tokens
        if requests and limits.requests_per_minute is not None:
            self.requests.add(now, requests)
        if tokens and limits.tokens_per_minute is not None:
            self.tokens.add(now, tokens)

    def rate_limits(self, limits: Limits, now: float) -> RateLimits:
        return RateLimits(
            requests=_rate_limit(limits.requests_per_minute, self._requests(now), self.requests, now),
            tokens=_rate_limit(limits.tokens_per_minute, self._tokens(now), self.tokens, now),
        )

    def is_idle(self, now: float) -> bool:
        """Return whether nothing is lost when it is dropped: the store has what was spent by now."""
        is_over = not (self.running or self.granted_requests or self.granted_tokens) and self.settled_at + MINUTE < now
        return is_over and self.requests.total(now) == 0 and self.tokens.total(now) == 0

    def _requests(self, now: float) -> int:
        return self.requests.total(now) + self.granted_requests

    def _tokens(self, now: float) -> int:
        return self.tokens.total(now) + self.granted_tokens

    def _refuse_request(self, name: str, limits: Limits, now: float) -> Refusal | None:
        limit = limits.requests_per_minute
        if limit is not None and self._requests(now) >= limit:
            wait = self.requests.free_in(now, self._requests(now) - limit + 1)
            return Refusal(
                "requests_per_minute",
                "rate_limit_exceeded",
                f"Rate limit of the key '{name}' reached: {limit} requests per minute. Try again in {_seconds(wait)}.",
                wait,
            )
        if limits.max_concurrent is not None and self.running >= limits.max_concurrent:
            return Refusal(
                "max_concurrent",
                "rate_limit_exceeded",
                f"The key '{name}' has {self.running} requests running, and {limits.max_concurrent} is its limit of "
                "concurrent requests. Try again when one of them has ended.",
                _RETRY_CONCURRENT,
            )
        return None

    def _refuse_tokens(self, name: str, limits: Limits, tokens: int, now: float, wall: float) -> Refusal | None:
        limit = limits.tokens_per_minute
        if limit is not None and self._tokens(now) + tokens > limit:
            return self._refuse_minute(name, limit, tokens, now)
        until = _next_day(wall), _next_month(wall)
        budgets = (limits.tokens_per_day, self.spent.of_day), (limits.tokens_per_month, self.spent.of_month)
        for period, end, (budget, spent) in zip(("day", "month"), until, budgets, strict=True):
            if budget is not None and (spent + self.reserved + tokens > budget or spent >= budget):
                return Refusal(
                    f"tokens_per_{period}",
                    "insufficient_quota",
                    f"The key '{name}' may use {budget} tokens per {period} (UTC). {spent} are used, {self.reserved} "
                    f"reserved by running requests, and this one needs about {tokens}. A new {period} begins in "
                    f"{_seconds(end)}.",
                    end,
                    should_retry=False,
                )
        return None

    def _refuse_minute(self, name: str, limit: int, tokens: int, now: float) -> Refusal:
        if tokens > limit:
            message = (
                f"This request needs about {tokens} tokens, prompt and completion together, and the limit of the key "
                f"'{name}' is {limit} tokens per minute. Lower max_tokens or shorten the prompt."
            )
            return Refusal("tokens_per_minute", "rate_limit_exceeded", message, MINUTE, should_retry=False)
        wait = self.tokens.free_in(now, self._tokens(now) + tokens - limit)
        return Refusal(
            "tokens_per_minute",
            "rate_limit_exceeded",
            f"Rate limit of the key '{name}' reached: {limit} tokens per minute, and this request needs about "
            f"{tokens}. Try again in {_seconds(wait)}.",
            wait,
        )

    def _tokens_left(self, limits: Limits, now: float) -> int | None:
        """Return the tokens that the tightest limit leaves; None without a limit."""
        left = [
            limit - used
            for limit, used in (
                (limits.tokens_per_minute, self._tokens(now)),
                (limits.tokens_per_day, self.spent.of_day + self.reserved),
                (limits.tokens_per_month, self.spent.of_month + self.reserved),
            )
            if limit is not None
        ]
        return max(0, min(left)) if left else None


def _rate_limit(limit: int | None, used: int, window: SlidingWindow, now: float) -> RateLimit | None:
    if limit is None:
        return None
    return RateLimit(limit, max(0, limit - used), round(window.reset_in(now), 3))


def _next_day(wall: float) -> float:
    """Return the seconds until the next day of UTC."""
    today = datetime.fromtimestamp(wall, UTC)
    return (today.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)).timestamp() - wall


def _next_month(wall: float) -> float:
    """Return the seconds until the next month of UTC."""
    today = datetime.fromtimestamp(wall, UTC)
    first = today.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1).timestamp() - wall


def _seconds(seconds: float) -> str:
    whole = max(1, -int(-seconds // 1))
    return f"{whole} s" if whole < 2 * MINUTE else f"{timedelta(seconds=whole)} (h:mm:ss)"
