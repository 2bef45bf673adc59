"""How much each key has used and may still use: the one count for all workers. Pure: time is an argument.

`accounts.py` asks. Requests and tokens per minute hold in any 60 seconds; budgets are for days and months of UTC. A
request reserves the tokens it may need when it is admitted, and what it did not use is given back when it is settled.

Workers hold shares of what is left, so as not to ask for every request. A share counts as used from the moment it is
given, and what was used of it from the moment the worker says so, which is later than it was: a limit may refuse a
moment too long, and never lets one too many through.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from llm_api_server.auth.access import Limits
from llm_api_server.ipc.quota_messages import NO_GRANT, QuotaGrant, RateLimit, RateLimits

MINUTE = 60.0
#: Seconds that are counted together, so that a minute of any traffic takes few entries.
_STEP = 0.1
#: Who waits as long as told must not come too early by an error of the last digit; far less than a step.
_ROUNDING = 1e-6
#: When a place among `max_concurrent` becomes free nobody knows.
_RETRY_CONCURRENT = 1.0
#: Of what is left a worker gets one part of so many, so that others find some; and no more than is used in moments.
_SHARE_PARTS = 8
_MOST_REQUESTS = 256
#: A share of less is not worth its messages.
_LEAST_REQUESTS = 2


@dataclass(frozen=True)
class Refusal:
    """`limit` is a field of `Limits`. `should_retry` is False where waiting a little does not help."""

    limit: str
    code: str
    message: str
    retry_after: float
    should_retry: bool | None = None


@dataclass
class Entry:
    """What was counted within one step. `at` is its end, so that a window never forgets too early."""

    at: float
    amount: int = 0


#: What was counted of a key in the last minute: ends of steps and amounts, first of requests, then of tokens.
Used = tuple[list[tuple[float, int]], list[tuple[float, int]]]


class Window:
    """A sum over the last minute."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._total = 0

    def add(self, now: float, amount: int) -> Entry:
        """The entry that holds `amount` until it leaves the window."""
        if not self._entries or self._entries[-1].at < now:
            self._entries.append(Entry(now + _STEP))
        entry = self._entries[-1]
        self._change(entry, amount)
        return entry

    def change(self, now: float, entry: Entry, amount: int) -> None:
        """Add `amount`, perhaps below zero, to what an entry held; nothing when that has left the window."""
        self.total(now)
        if entry.at + MINUTE > now + _ROUNDING:
            self._change(entry, amount)

    def total(self, now: float) -> int:
        while self._entries and self._entries[0].at + MINUTE <= now + _ROUNDING:
            self._total -= self._entries.popleft().amount
        return self._total

    def free_in(self, now: float, amount: int) -> float:
        """Seconds until `amount` will have left."""
        left = amount
        for entry in self._entries:
            left -= entry.amount
            if left <= 0:
                return max(0.0, entry.at + MINUTE - now)
        return MINUTE

    def entries(self, now: float) -> list[tuple[float, int]]:
        """Ends of steps, and what was counted in each."""
        self.total(now)
        return [(entry.at, entry.amount) for entry in self._entries if entry.amount]

    def restore(self, entries: list[tuple[float, int]], now: float) -> None:
        """What another counted, before anything is counted here."""
        for at, amount in entries:
            if now - MINUTE < at <= now + _STEP:
                self._entries.append(Entry(at))
                self._change(self._entries[-1], amount)

    def reset_in(self, now: float) -> float:
        """Seconds until it is empty, if nothing is added."""
        last = next((entry for entry in reversed(self._entries) if entry.amount), None)
        return max(0.0, last.at + MINUTE - now) if last else 0.0

    def _change(self, entry: Entry, amount: int) -> None:
        entry.amount += amount
        self._total += amount


@dataclass
class _Spent:
    """Tokens of the current day and month."""

    day: str = ""
    month: str = ""
    of_day: int = 0
    of_month: int = 0

    def turn(self, wall: float) -> None:
        today = datetime.fromtimestamp(wall, UTC)
        day, month = today.strftime("%Y-%m-%d"), today.strftime("%Y-%m")
        if day != self.day:
            self.day, self.of_day = day, 0
        if month != self.month:
            self.month, self.of_month = month, 0


@dataclass
class Reservation:
    """What one admitted request holds."""

    tokens: int
    entry: Entry | None


@dataclass
class KeyQuota:
    """One key's. `now` is a clock that never jumps, `wall` Unix seconds; both in seconds."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0
    reserved: int = 0
    shared_requests: int = 0
    shared_tokens: int = 0
    spent: _Spent = field(default_factory=_Spent)
    settled_at: float = float("-inf")

    def add_spent(self, of_day: int, of_month: int, wall: float) -> None:
        """What was used before this account was opened."""
        self.spent.turn(wall)
        self.spent.of_day += of_day
        self.spent.of_month += of_month

    def admit(self, name: str, limits: Limits, ask: tuple[int, int], now: float, wall: float) -> Reservation | Refusal:
        """`ask`: tokens that the request needs at least, and how many more it would like to have reserved."""
        self.spent.turn(wall)
        refusal = self._refuse_request(name, limits, now) or self._refuse_tokens(name, limits, ask[0], now, wall)
        if refusal is not None:
            return refusal
        need, spare = ask
        left = self._tokens_left(limits, now)
        tokens = need + spare if left is None else max(need, min(need + spare, left))
        return self._take(limits, tokens, now)

    def used(self, now: float) -> Used:
        return self.requests.entries(now), self.tokens.entries(now)

    def restore_used(self, used: Used, now: float) -> None:
        """What another manager counted."""
        self.requests.restore(used[0], now)
        self.tokens.restore(used[1], now)

    def restore(self, tokens: int) -> Reservation:
        """A request that another manager admitted: it runs, and its tokens count in its budgets."""
        self.running += 1
        self.reserved += tokens
        return Reservation(tokens, None)

    def settle(self, reservation: Reservation, used: int, now: float, wall: float) -> None:
        self.spent.turn(wall)
        self.settled_at = now
        self.running -= 1
        self.reserved -= reservation.tokens
        self.spent.of_day += used
        self.spent.of_month += used
        if reservation.entry is not None:
            self.tokens.change(now, reservation.entry, used - reservation.tokens)

    def share(self, limits: Limits, tokens: int, now: float) -> QuotaGrant:
        """For a worker whose requests take about `tokens` each; nothing where a limit is near."""
        counts = [_MOST_REQUESTS]
        requests, places = limits.requests_per_minute, limits.max_concurrent
        left = self._tokens_left(limits, now)
        if requests is not None:
            counts.append((requests - self._requests(now)) // _SHARE_PARTS)
        if places is not None:
            counts.append((places - self.running) // _SHARE_PARTS)
        if left is not None:
            counts.append(left // _SHARE_PARTS // max(1, tokens))
        count = min(counts)
        if count < _LEAST_REQUESTS:
            return NO_GRANT
        share = QuotaGrant(
            requests=count if requests is not None else 0,
            tokens=count * tokens if left is not None else 0,
            concurrent=count if places is not None else 0,
        )
        self.shared_requests += share.requests
        self.shared_tokens += share.tokens
        self.reserved += share.tokens
        self.running += share.concurrent
        return share

    def spend(self, limits: Limits, requests: int, tokens: int, back: QuotaGrant, now: float, wall: float) -> None:
        """What a worker used of its shares, and what it gives back."""
        self.spent.turn(wall)
        self.settled_at = now
        self.shared_requests -= requests + back.requests
        self.shared_tokens -= tokens + back.tokens
        self.reserved -= tokens + back.tokens
        self.running -= back.concurrent
        self.spent.of_day += tokens
        self.spent.of_month += tokens
        if requests and limits.requests_per_minute is not None:
            self.requests.add(now, requests)
        if tokens and limits.tokens_per_minute is not None:
            self.tokens.add(now, tokens)

    def standing(self, limits: Limits, now: float) -> RateLimits:
        return RateLimits(
            requests=_quota(limits.requests_per_minute, self._requests(now), self.requests, now),
            tokens=_quota(limits.tokens_per_minute, self._tokens(now), self.tokens, now),
        )

    def is_idle(self, now: float) -> bool:
        """Nothing is lost when it is forgotten: what was spent is in the store by now."""
        is_over = not (self.running or self.shared_requests or self.shared_tokens) and self.settled_at + MINUTE < now
        return is_over and self.requests.total(now) == 0 and self.tokens.total(now) == 0

    def _requests(self, now: float) -> int:
        return self.requests.total(now) + self.shared_requests

    def _tokens(self, now: float) -> int:
        return self.tokens.total(now) + self.shared_tokens

    def _take(self, limits: Limits, tokens: int, now: float) -> Reservation:
        self.running += 1
        self.reserved += tokens
        if limits.requests_per_minute is not None:
            self.requests.add(now, 1)
        entry = self.tokens.add(now, tokens) if limits.tokens_per_minute is not None else None
        return Reservation(tokens, entry)

    def _refuse_request(self, name: str, limits: Limits, now: float) -> Refusal | None:
        most = limits.requests_per_minute
        if most is not None and self._requests(now) >= most:
            wait = self.requests.free_in(now, self._requests(now) - most + 1)
            return Refusal(
                "requests_per_minute",
                "rate_limit_exceeded",
                f"Rate limit of the key '{name}' reached: {most} requests per minute. Try again in {_seconds(wait)}.",
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

    def _refuse_tokens(self, name: str, limits: Limits, need: int, now: float, wall: float) -> Refusal | None:
        most = limits.tokens_per_minute
        if most is not None and self._tokens(now) + need > most:
            return self._refuse_minute(name, most, need, now)
        until = _next_day(wall), _next_month(wall)
        budgets = (limits.tokens_per_day, self.spent.of_day), (limits.tokens_per_month, self.spent.of_month)
        for period, end, (budget, spent) in zip(("day", "month"), until, budgets, strict=True):
            if budget is not None and (spent + self.reserved + need > budget or spent >= budget):
                return Refusal(
                    f"tokens_per_{period}",
                    "insufficient_quota",
                    f"The key '{name}' may use {budget} tokens per {period} (UTC). {spent} are used, {self.reserved} "
                    f"reserved by running requests, and this one needs about {need}. A new {period} begins in "
                    f"{_seconds(end)}.",
                    end,
                    should_retry=False,
                )
        return None

    def _refuse_minute(self, name: str, most: int, need: int, now: float) -> Refusal:
        if need > most:
            message = (
                f"This request asks for about {need} tokens, prompt and answer together, and the limit of the key "
                f"'{name}' is {most} tokens per minute. Lower max_tokens or shorten the prompt."
            )
            return Refusal("tokens_per_minute", "rate_limit_exceeded", message, MINUTE, should_retry=False)
        wait = self.tokens.free_in(now, self._tokens(now) + need - most)
        return Refusal(
            "tokens_per_minute",
            "rate_limit_exceeded",
            f"Rate limit of the key '{name}' reached: {most} tokens per minute, and this request needs about {need}. "
            f"Try again in {_seconds(wait)}.",
            wait,
        )

    def _tokens_left(self, limits: Limits, now: float) -> int | None:
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


def _quota(limit: int | None, used: int, window: Window, now: float) -> RateLimit | None:
    if limit is None:
        return None
    return RateLimit(limit, max(0, limit - used), round(window.reset_in(now), 3))


def _next_day(wall: float) -> float:
    today = datetime.fromtimestamp(wall, UTC)
    return (today.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)).timestamp() - wall


def _next_month(wall: float) -> float:
    today = datetime.fromtimestamp(wall, UTC)
    first = today.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1).timestamp() - wall


def _seconds(seconds: float) -> str:
    whole = max(1, -int(-seconds // 1))
    return f"{whole} s" if whole < 2 * MINUTE else f"{timedelta(seconds=whole)} (h:mm:ss)"
