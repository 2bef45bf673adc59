"""Who may run: the limits of all keys, counted for all workers. On the manager's one loop.

`server.py` calls the methods that take a `WorkerSession`; what a key may use is decided by `quotas.py`. Where a
refusal comes
up while workers hold shares of the key's limits, these are recalled first: what is left there decides.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_api_server.auth.access import NO_LIMITS, Limits
from llm_api_server.errors import StoreError
from llm_api_server.event_loop.background import TaskSet
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.quota_messages import (
    NO_GRANT,
    Admit,
    Admitted,
    AdmittedRequest,
    QuotaGrant,
    ReportQuota,
    RevokeQuota,
)
from llm_api_server.manager.limits.key_quota import KeyQuota, Refusal, Reservation, Used

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

#: Seconds that a budget waits for the database to tell what was used before; then it counts from now on.
BASE_TIMEOUT = 2.0
#: Seconds between two tries to read from a database that cannot be reached.
RETRY_INTERVAL = 1.0
#: Seconds that a worker has to give back its share; then the request is decided without it.
RECALL_TIMEOUT = 1.0


@dataclass
class _Opened:
    """An account, the look-up of what its key used before, and who waits for shares to come back."""

    account: KeyQuota = field(default_factory=KeyQuota)
    limits: Limits = NO_LIMITS
    base: asyncio.Task[None] | None = None
    recalled: set[WorkerSession] = field(default_factory=set)
    waiting: list[tuple[_Holder, Admit]] = field(default_factory=list)
    timeout: asyncio.TimerHandle | None = None


@dataclass
class _Holder:
    """What a worker holds: requests by its own numbers (None while the answer is being found), and shares by key."""

    client: WorkerSession
    admitted: dict[int, tuple[str, Reservation] | None] = field(default_factory=dict)
    shares: dict[str, QuotaGrant] = field(default_factory=dict)
    #: Keys whose share was recalled: nothing is left of it but what its running requests need.
    emptied: set[str] = field(default_factory=set)


class AdmissionController:
    """Limits of all keys.

    `spent` returns the tokens that a key used in this UTC day and month, or raises `StoreError`. `on_refused` is called
    with the names of the key and the limit.
    """

    def __init__(
        self, spent: Callable[[str], Awaitable[tuple[int, int]]], on_refused: Callable[[str, str], None]
    ) -> None:
        self._spent = spent
        self._tasks = TaskSet()
        self._on_refused = on_refused
        self._holders: dict[WorkerSession, _Holder] = {}
        self._opened: dict[str, _Opened] = {}

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, client: WorkerSession, admitted: list[AdmittedRequest]) -> None:
        """A worker is here; what an earlier manager admitted for it goes on being counted."""
        holder = self._holders[client] = _Holder(client)
        for one in admitted:
            reservation = self._account(one.key_id).restore(one.reserved)
            holder.admitted[one.request] = (one.key_id, reservation)

    def disconnected(self, client: WorkerSession) -> None:
        """What it held is free at once. Requests that it may have admitted count as such."""
        holder = self._holders.pop(client, None)
        if holder is None:
            return
        for held in holder.admitted.values():
            if held is not None:
                self._settle(held, 0)
        for key_id, share in holder.shares.items():
            back = QuotaGrant(tokens=share.tokens, concurrent=share.concurrent)
            self._spend(self._opened[key_id], ReportQuota(key_id, requests=share.requests, returned=back))
        for opened in self._opened.values():
            self._came_back(opened, client)

    def add_spent(self, tokens: Counter[str]) -> None:
        """By key: what requests of a lost worker used."""
        for key_id, used in tokens.items():
            if key_id in self._opened:
                self._opened[key_id].account.add_spent(used, used, time.time())

    def used(self) -> dict[str, Used]:
        """By key, in the last minute."""
        now = _now()
        found = {key_id: opened.account.used(now) for key_id, opened in self._opened.items()}
        return {key_id: used for key_id, used in found.items() if any(used)}

    def restore_used(self, used: dict[str, Used]) -> None:
        """What an earlier manager counted, before this one counts."""
        for key_id, theirs in used.items():
            self._account(key_id).restore_used(theirs, _now())

    def forget_idle(self) -> None:
        now = _now()
        for key_id, opened in list(self._opened.items()):
            is_open = opened.waiting or (opened.base is not None and not opened.base.done())
            if not is_open and opened.account.is_idle(now):
                del self._opened[key_id]

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, client: WorkerSession, question: Admit) -> None:
        opened = self._opened.setdefault(question.key_id, _Opened())
        opened.limits = limits = question.limits
        if not question.counts:
            client.send(Admitted(question.request, opened.account.standing(limits, _now())))
            return
        holder = self._holders.get(client)
        if holder is None:
            return
        holder.admitted[question.request] = None
        has_budget = limits.tokens_per_day is not None or limits.tokens_per_month is not None
        if has_budget and (opened.base is None or not opened.base.done()):
            self._tasks.start(self._admit_with_base(holder, question, opened))
        else:
            self._admit(holder, question, opened)

    def settle(self, client: WorkerSession, request: int, tokens: int) -> None:
        holder = self._holders.get(client)
        held = holder.admitted.pop(request, None) if holder is not None else None
        if held is not None:
            self._settle(held, tokens)

    def spend(self, client: WorkerSession, said: ReportQuota) -> None:
        """What a worker says of its share."""
        holder, opened = self._holders.get(client), self._opened.get(said.key_id)
        if holder is None or opened is None:
            return
        share = holder.shares.get(said.key_id, NO_GRANT)
        left = QuotaGrant(
            share.requests - said.requests - said.returned.requests,
            share.tokens - said.tokens - said.returned.tokens,
            share.concurrent - said.returned.concurrent,
        )
        if left == NO_GRANT:
            holder.shares.pop(said.key_id, None)
            holder.emptied.discard(said.key_id)
        else:
            holder.shares[said.key_id] = left
        self._spend(opened, said)
        if said.is_reply:
            self._came_back(opened, client)

    async def _admit_with_base(self, holder: _Holder, question: Admit, opened: _Opened) -> None:
        if opened.base is None:
            opened.base = asyncio.create_task(self._open(question.key_id, opened))
        await asyncio.wait({opened.base}, timeout=BASE_TIMEOUT)
        self._admit(holder, question, opened)

    async def _open(self, key_id: str, opened: _Opened) -> None:
        """What the key used before this manager counted. Read behind all writes, so that nothing counts twice."""
        while True:
            try:
                of_day, of_month = await self._spent(key_id)
            except StoreError:  # told by those who look for changes
                await asyncio.sleep(RETRY_INTERVAL)
            else:
                opened.account.add_spent(of_day, of_month, time.time())
                return

    def _admit(self, holder: _Holder, question: Admit, opened: _Opened, *, is_last_word: bool = False) -> None:
        number = question.request
        if number not in holder.admitted or holder.client not in self._holders:
            return  # it left meanwhile
        if opened.waiting and not is_last_word:
            opened.waiting.append((holder, question))
            return
        now, account, limits = _now(), opened.account, question.limits
        found = account.admit(question.name, limits, (question.tokens, question.optional_tokens), now, time.time())
        if isinstance(found, Refusal):
            shares = [] if is_last_word else self._with_shares(question.key_id)
            if shares:
                opened.waiting.append((holder, question))
                self._recall(question.key_id, opened, shares)
                return
            del holder.admitted[number]
            self._on_refused(question.name, found.limit)
            standing = account.standing(limits, now)
            holder.client.send(
                Refused(number, found.code, found.message, found.retry_after, found.should_retry, standing)
            )
            return
        holder.admitted[number] = (question.key_id, found)
        standing = account.standing(limits, now)
        share = NO_GRANT if is_last_word else account.share(limits, question.tokens + question.optional_tokens, now)
        if share != NO_GRANT:
            held = holder.shares.get(question.key_id, NO_GRANT)
            holder.shares[question.key_id] = QuotaGrant(
                held.requests + share.requests, held.tokens + share.tokens, held.concurrent + share.concurrent
            )
            holder.emptied.discard(question.key_id)
        holder.client.send(Admitted(number, standing, found.tokens, share))

    # ── shares that are recalled ─────────────────────────────────────────────────────────────────────────────────

    def _with_shares(self, key_id: str) -> list[_Holder]:
        """Those that something may be left at."""
        holders = self._holders.values()
        return [holder for holder in holders if key_id in holder.shares and key_id not in holder.emptied]

    def _recall(self, key_id: str, opened: _Opened, holders: list[_Holder]) -> None:
        opened.recalled = {holder.client for holder in holders}
        opened.timeout = asyncio.get_running_loop().call_later(RECALL_TIMEOUT, self._decide, opened)
        for holder in holders:
            holder.emptied.add(key_id)
            holder.client.send(RevokeQuota(key_id))

    def _came_back(self, opened: _Opened, client: WorkerSession) -> None:
        if client in opened.recalled:
            opened.recalled.discard(client)
            if not opened.recalled:
                self._decide(opened)

    def _decide(self, opened: _Opened) -> None:
        """All shares are back, or as many as come in time."""
        if opened.timeout is not None:
            opened.timeout.cancel()
        opened.recalled.clear()
        waiting, opened.waiting = opened.waiting, []
        for holder, question in waiting:
            self._admit(holder, question, opened, is_last_word=True)

    def _spend(self, opened: _Opened, said: ReportQuota) -> None:
        opened.account.spend(opened.limits, said.requests, said.tokens, said.returned, _now(), time.time())

    def _settle(self, held: tuple[str, Reservation], tokens: int) -> None:
        key_id, reservation = held
        self._account(key_id).settle(reservation, tokens, _now(), time.time())

    def _account(self, key_id: str) -> KeyQuota:
        return self._opened.setdefault(key_id, _Opened()).account


def _now() -> float:
    """It does not jump."""
    return time.monotonic()
