"""Admission of requests to the limits of their keys, for all workers. On the manager's one loop.

Workers hold quota that was granted in advance. Before a request is refused, that quota is revoked, and what the workers
return decides.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

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
    RateLimits,
    ReportQuota,
    RevokeQuota,
    Settle,
)
from llm_api_server.manager.limits.key_quota import KeyQuota, Refusal, Reservation, Used
from llm_api_server.manager.worker_session import WorkerSession

#: Seconds that a budget waits for the database to return what was used before; then it counts from now on.
SPENT_TIMEOUT = 2.0
#: Seconds between two tries to read from a database that cannot be reached.
RETRY_INTERVAL = 1.0
#: Seconds that workers have to return revoked quota; then the request is decided without it.
REVOKE_TIMEOUT = 1.0


@dataclass
class _Key:
    """A key's quota, the look-up of what it used before, and the requests that wait until revoked quota is back."""

    quota: KeyQuota = field(default_factory=KeyQuota)
    limits: Limits = NO_LIMITS
    spent: asyncio.Task[None] | None = None
    revoked_from: set[WorkerSession] = field(default_factory=set)
    waiting: list[tuple[_Worker, Admit]] = field(default_factory=list)
    timeout: asyncio.TimerHandle | None = None

    @property
    def is_spent_known(self) -> bool:
        return self.spent is not None and self.spent.done()


@dataclass
class _Worker:
    """Requests of a worker that are admitted, by number (None until decided), and quota granted to it, by key."""

    session: WorkerSession
    admitted: dict[int, tuple[str, Reservation] | None] = field(default_factory=dict)
    granted: dict[str, QuotaGrant] = field(default_factory=dict)
    #: Keys whose quota was revoked: the worker only holds what its running requests need.
    revoked: set[str] = field(default_factory=set)


class AdmissionController:
    """Limits of all keys.

    `spent` returns the tokens that a key used in this UTC day and month, or raises `StoreError`. `on_refused` is called
    with the names of the key and the limit.
    """

    def __init__(
        self,
        spent: Callable[[str], Awaitable[tuple[int, int]]],
        on_refused: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        spent_timeout: float = SPENT_TIMEOUT,
        revoke_timeout: float = REVOKE_TIMEOUT,
    ) -> None:
        self._spent = spent
        self._on_refused = on_refused
        self._now = clock
        self._spent_timeout = spent_timeout
        self._revoke_timeout = revoke_timeout
        self._tasks = TaskSet()
        self._workers: dict[WorkerSession, _Worker] = {}
        self._keys: dict[str, _Key] = {}

    def register(self, session: WorkerSession, admitted: list[AdmittedRequest]) -> None:
        """Register a worker, and count the requests that an earlier manager admitted for it."""
        worker = self._workers[session] = _Worker(session)
        for one in admitted:
            worker.admitted[one.request] = (one.key_id, self._quota(one.key_id).restore(one.reserved))

    def disconnect(self, session: WorkerSession) -> None:
        """Free all that the worker held. Requests that it may have admitted from its quota count."""
        worker = self._workers.pop(session, None)
        if worker is None:
            return
        for held in worker.admitted.values():
            if held is not None:
                self._settle(held, 0)
        for key_id, grant in worker.granted.items():
            returned = QuotaGrant(tokens=grant.tokens, concurrent=grant.concurrent)
            self._count(self._keys[key_id], ReportQuota(key_id, requests=grant.requests, returned=returned))
        for key in self._keys.values():
            self._on_returned(key, session)

    def admit(self, session: WorkerSession, admit: Admit) -> None:
        """Send `Admitted` or `Refused`, perhaps only once other workers have returned their quota."""
        key = self._keys.setdefault(admit.key_id, _Key())
        key.limits = limits = admit.limits
        if not admit.counts:
            session.send(Admitted(admit.request, key.quota.rate_limits(limits, self._now())))
            return
        worker = self._workers.get(session)
        if worker is None:
            return
        worker.admitted[admit.request] = None
        has_budget = limits.tokens_per_day is not None or limits.tokens_per_month is not None
        if has_budget and not key.is_spent_known:
            self._tasks.start(self._admit_when_spent_is_known(worker, admit, key))
        else:
            self._decide(worker, admit, key)

    def settle(self, session: WorkerSession, settle: Settle) -> None:
        worker = self._workers.get(session)
        held = worker.admitted.pop(settle.request, None) if worker is not None else None
        if held is not None:
            self._settle(held, settle.tokens)

    def report(self, session: WorkerSession, report: ReportQuota) -> None:
        """Count what a worker used of its quota, and take back what it returns."""
        worker, key = self._workers.get(session), self._keys.get(report.key_id)
        if worker is None or key is None:
            return
        grant = worker.granted.get(report.key_id, NO_GRANT)
        left = QuotaGrant(
            grant.requests - report.requests - report.returned.requests,
            grant.tokens - report.tokens - report.returned.tokens,
            grant.concurrent - report.returned.concurrent,
        )
        if left == NO_GRANT:
            worker.granted.pop(report.key_id, None)
            worker.revoked.discard(report.key_id)
        else:
            worker.granted[report.key_id] = left
        self._count(key, report)
        if report.is_reply:
            self._on_returned(key, session)

    def add_spent(self, tokens: Counter[str]) -> None:
        """Count, by key, the tokens that requests of a lost worker used."""
        for key_id, used in tokens.items():
            if key_id in self._keys:
                self._keys[key_id].quota.add_spent(used, used, time.time())

    def used(self) -> dict[str, Used]:
        """Return what each key used in the last minute."""
        now = self._now()
        used_by_key = {key_id: key.quota.used(now) for key_id, key in self._keys.items()}
        return {key_id: used for key_id, used in used_by_key.items() if any(used)}

    def restore_used(self, used_by_key: dict[str, Used]) -> None:
        """Count what an earlier manager counted, before this one counts."""
        for key_id, used in used_by_key.items():
            self._quota(key_id).restore_used(used, self._now())

    def forget_idle(self) -> None:
        """Drop keys that hold nothing that is not in the store."""
        now = self._now()
        for key_id, key in list(self._keys.items()):
            is_pending = key.waiting or (key.spent is not None and not key.spent.done())
            if not is_pending and key.quota.is_idle(now):
                del self._keys[key_id]

    async def _admit_when_spent_is_known(self, worker: _Worker, admit: Admit, key: _Key) -> None:
        if key.spent is None:
            key.spent = asyncio.create_task(self._look_up_spent(admit.key_id, key))
        await asyncio.wait({key.spent}, timeout=self._spent_timeout)
        self._decide(worker, admit, key)

    async def _look_up_spent(self, key_id: str, key: _Key) -> None:
        """Count what the key used before this manager counted, once the database can be read."""
        while True:
            try:
                of_day, of_month = await self._spent(key_id)
            except StoreError:  # the key directory logs it
                await asyncio.sleep(RETRY_INTERVAL)
            else:
                key.quota.add_spent(of_day, of_month, time.time())
                return

    def _decide(self, worker: _Worker, admit: Admit, key: _Key, *, is_final: bool = False) -> None:
        """Admit or refuse; unless `is_final`, revoke granted quota before refusing, and wait for it."""
        number = admit.request
        if number not in worker.admitted or worker.session not in self._workers:
            return  # settled or disconnected meanwhile
        if key.waiting and not is_final:
            key.waiting.append((worker, admit))
            return
        now, quota, limits = self._now(), key.quota, admit.limits
        found = quota.admit(admit.name, limits, admit.tokens, admit.optional_tokens, now, time.time())
        if isinstance(found, Reservation):
            worker.admitted[number] = (admit.key_id, found)
            rate_limits = quota.rate_limits(limits, now)
            grant = NO_GRANT if is_final else self._grant(worker, admit, key, now)
            worker.session.send(Admitted(number, rate_limits, found.tokens, grant))
            return
        holders = [] if is_final else self._holders(admit.key_id)
        if holders:
            key.waiting.append((worker, admit))
            self._revoke(admit.key_id, key, holders)
        else:
            self._refuse(worker, admit, found, quota.rate_limits(limits, now))

    def _refuse(self, worker: _Worker, admit: Admit, refusal: Refusal, rate_limits: RateLimits) -> None:
        del worker.admitted[admit.request]
        self._on_refused(admit.name, refusal.limit)
        worker.session.send(
            Refused(
                admit.request,
                refusal.code,
                refusal.message,
                refusal.retry_after,
                refusal.should_retry,
                rate_limits,
            )
        )

    def _grant(self, worker: _Worker, admit: Admit, key: _Key, now: float) -> QuotaGrant:
        """Grant the worker quota for further requests like this one."""
        grant = key.quota.grant(admit.limits, admit.tokens + admit.optional_tokens, now)
        if grant != NO_GRANT:
            held = worker.granted.get(admit.key_id, NO_GRANT)
            worker.granted[admit.key_id] = QuotaGrant(
                held.requests + grant.requests, held.tokens + grant.tokens, held.concurrent + grant.concurrent
            )
            worker.revoked.discard(admit.key_id)
        return grant

    def _holders(self, key_id: str) -> list[_Worker]:
        """Return the workers whose quota of the key may be partly unused."""
        workers = self._workers.values()
        return [worker for worker in workers if key_id in worker.granted and key_id not in worker.revoked]

    def _revoke(self, key_id: str, key: _Key, holders: list[_Worker]) -> None:
        key.revoked_from = {worker.session for worker in holders}
        key.timeout = asyncio.get_running_loop().call_later(self._revoke_timeout, self._decide_waiting, key)
        for worker in holders:
            worker.revoked.add(key_id)
            worker.session.send(RevokeQuota(key_id))

    def _on_returned(self, key: _Key, session: WorkerSession) -> None:
        if session in key.revoked_from:
            key.revoked_from.discard(session)
            if not key.revoked_from:
                self._decide_waiting(key)

    def _decide_waiting(self, key: _Key) -> None:
        """Decide the requests that waited for revoked quota: all of it is back, or the timeout has passed."""
        if key.timeout is not None:
            key.timeout.cancel()
        key.revoked_from.clear()
        waiting, key.waiting = key.waiting, []
        for worker, admit in waiting:
            self._decide(worker, admit, key, is_final=True)

    def _count(self, key: _Key, report: ReportQuota) -> None:
        key.quota.report(key.limits, report.requests, report.tokens, report.returned, self._now(), time.time())

    def _settle(self, held: tuple[str, Reservation], tokens: int) -> None:
        key_id, reservation = held
        self._quota(key_id).settle(reservation, tokens, self._now(), time.time())

    def _quota(self, key_id: str) -> KeyQuota:
        return self._keys.setdefault(key_id, _Key()).quota
