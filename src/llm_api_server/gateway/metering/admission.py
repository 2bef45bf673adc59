"""Limits and the ledger, as a worker sees them: asks before a request may run, tells what it used when it is over.

A part of the worker's link to the manager (`link.py`). Requests of keys without limits, or with limits that are far
(`shares.py`), cost no message of their own: what the ledger needs goes out in batches, and a batch is kept here until
the manager has it in the store. So a worker that is killed takes at most the last `REPORT_INTERVAL` with it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from loguru import logger

from llm_api_server.auth.access import NO_LIMITS, Key
from llm_api_server.errors import ApiError
from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.quota_grant import HeldQuota
from llm_api_server.gateway.metering.ratelimit_headers import ratelimit_headers
from llm_api_server.gateway.metering.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.quota_messages import NO_GRANT
from llm_api_server.ipc.trace_context import Traced
from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    Batch,
    Live,
    Other,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    Usage,
    Whole,
)

#: Seconds between two reports: how much of the ledger a killed worker can take with it.
REPORT_INTERVAL = 0.5
#: An answer waits no longer for headers that tell how its key stands.
LOOK_TIMEOUT = 1.0
#: Rows that wait here while no manager takes them; beyond it the oldest are given up, and the log says so.
MAX_WAITING_ROWS = 200_000
_NOTHING = Batch()


def _started(record: RequestRecord, wall: float) -> RequestStarted:
    """`wall`: what the clock of `started_at` lacks to Unix seconds."""
    key, row = record.key, record.row
    assert key is not None
    assert row is not None
    return RequestStarted(
        row=row,
        request_id=record.request_id,
        key_id=key.key_id,
        key_name=key.name,
        model=record.model or "",
        endpoint=record.path,
        stream=record.stream,
        at=wall + record.started_at,
        prompt=record.prompt,
    )


def _ended(record: RequestRecord) -> RequestEnded:
    assert record.row is not None
    return RequestEnded(
        row=record.row,
        status=record.status,
        error=record.error,
        instance=record.instance,
        usage=record.used,
        queued=record.queued_seconds,
        first_token=record.first_token_seconds,
        duration=record.seconds,
    )


def _whole(record: RequestRecord) -> Whole:
    """At its end: to make them all at the time of a report would be a pause."""
    key_id, key_name = (record.key.key_id, record.key.name) if record.key is not None else ("", "")
    return Whole(
        record.row or "", record.request_id, key_id, key_name, record.model or "", record.path, record.stream,
        time.time() - record.seconds, record.prompt, record.status, record.error, record.instance, record.used,
        record.queued_seconds, record.first_token_seconds, record.seconds,
    )  # fmt: skip


def _alike(record: RequestRecord) -> tuple[str, str, str, int, str]:
    """What an `Other` tells besides the count."""
    endpoint = record.path if record.path in ENDPOINTS else "other"
    key_name = record.key.name if record.key is not None else ""
    return endpoint, record.model or "", key_name, record.status or CLIENT_CLOSED_REQUEST, record.error or ""


class AdmissionClient:
    """All admissions and rows of one worker."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        #: Who waits for the manager's word, and whose request ended before it came.
        self._asking: dict[int, RequestRecord] = {}
        self._left: dict[int, Key] = {}
        self._admitted: dict[int, quota_messages.AdmittedRequest] = {}
        self._shares: dict[str, HeldQuota] = {}
        #: What was taken from shares: of which, and how many tokens, by the request's number.
        self._taken: dict[int, tuple[HeldQuota, int]] = {}
        self._running: dict[str, RequestRecord] = {}
        self._reported: dict[str, Usage] = {}
        self._told: dict[str, Live] = {}
        #: Rows to be told of with the next report: that they have begun; that they have ended, or all of them.
        self._begun: dict[str, RequestRecord] = {}
        self._over: list[RequestRecord] = []
        self._whole: list[Whole] = []
        self._others: Counter[tuple[str, str, str, int, str]] = Counter()
        self._traced: list[Traced] = []
        self._sent: deque[messages.ReportUsage] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.handlers: dict[type, Callable[[Any], None]] = {
            quota_messages.Admitted: self._on_admitted,
            messages.UsageKept: self._on_kept,
            quota_messages.RevokeQuota: self._on_recall,
        }
        link.add(self)

    # ── limits ──

    async def admit(self, record: RequestRecord, tokens: int, spare: int) -> None:
        """Count a request against its key's limits and note how the key stands. Raises the refusal.

        `tokens` are reserved, and up to `spare` more where the limits leave them.
        """
        if self.admit_at_once(record, tokens + spare):
            return
        key = record.key
        assert key is not None
        number = self._link.number()
        question = quota_messages.Admit(number, key.key_id, key.name, key.limits, tokens, spare)
        self._asking[number] = record
        try:
            await self._link.ask(question)
        except ApiError as error:
            self._asking.pop(number, None)
            record.limit_lines = ratelimit_headers(error.rate_limits) if error.rate_limits is not None else None
            raise
        except asyncio.CancelledError:
            if self._asking.pop(number, None) is not None:
                self._left[number] = key  # a share may be under way
            self._admitted.pop(number, None)
            self._link.send(quota_messages.Settle(number, 0))
            raise

    def _on_admitted(self, answer: quota_messages.Admitted) -> None:
        """At the moment it comes: a recall of the share may be right behind it."""
        number = answer.request
        record = self._asking.pop(number, None)
        key = record.key if record is not None else self._left.pop(number, None)
        lines = None
        if key is not None and answer.grant != NO_GRANT:
            lines = self._add_share(key, answer).lines()
        elif key is not None and (share := self._shares.get(key.key_id)) is not None:
            share.hear(answer.rate_limits)
            lines = share.lines()
        if record is not None and key is not None:
            record.admission, record.limit_lines = number, lines or ratelimit_headers(answer.rate_limits)
            self._admitted[number] = quota_messages.AdmittedRequest(number, key.key_id, answer.reserved)

    def admit_at_once(self, record: RequestRecord, tokens: int) -> bool:
        """`admit`, where the key has no limits, or a share of them is here."""
        key = record.key
        assert key is not None
        if key.limits == NO_LIMITS:
            return True
        share = self._shares.get(key.key_id)
        if share is None or (share.limits is not key.limits and share.limits != key.limits):
            return False
        if (lines := share.take(tokens)) is None:
            return False
        record.limit_lines = lines
        number = record.admission = next(self._link.numbers)
        self._taken[number] = share, tokens
        return True

    async def look(self, key: Key) -> bytes | None:
        """`ratelimit_headers` without counting a request; None where it has no limits per minute or nobody can tell."""
        limits = key.limits
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            return None
        question = quota_messages.Admit(self._link.number(), key.key_id, key.name, limits, counts=False)
        await ensure_task()
        try:
            async with asyncio.timeout(LOOK_TIMEOUT):
                answer = await self._link.ask(question, repeats=False)
        except (ApiError, TimeoutError):
            return None
        return ratelimit_headers(answer.rate_limits)

    def _settle(self, number: int, used: Usage) -> None:
        tokens = used.prompt_tokens + used.completion_tokens
        if (taken := self._taken.pop(number, None)) is not None:
            share, reserved = taken
            share.settle(reserved, tokens)
            if share.is_recalled:
                self._give_back(share)
        elif self._admitted.pop(number, None) is not None:
            self._link.send(quota_messages.Settle(number, tokens))

    # ── shares ──

    def _add_share(self, key: Key, answer: quota_messages.Admitted) -> HeldQuota:
        share = self._shares.get(key.key_id)
        if share is not None and share.limits != key.limits:
            share.is_recalled = True  # its requests end there; the key has other limits by now
            self._give_back(share)
            share = None
        if share is None:
            share = self._shares[key.key_id] = HeldQuota(key.key_id, key.limits)
        share.add(answer.grant, answer.rate_limits)
        self._plan_report()
        return share

    def _on_recall(self, recall: quota_messages.RevokeQuota) -> None:
        share = self._shares.get(recall.key_id)
        if share is None:
            self._link.send(quota_messages.ReportQuota(recall.key_id, is_reply=True))
            return
        share.is_recalled = True
        self._give_back(share, is_answer=True)

    def _give_back(self, share: HeldQuota, *, is_answer: bool = False) -> None:
        if (spend := share.spend(returns=True, is_answer=is_answer)) is not None:
            self._link.send(spend)
        if share.is_empty and self._shares.get(share.key_id) is share:
            del self._shares[share.key_id]

    def _tell_shares(self) -> None:
        for share in list(self._shares.values()):
            if share.is_idle:
                self._give_back(share)
            elif (spend := share.spend(returns=share.is_recalled)) is not None:
                self._link.send(spend)

    # ── the ledger ──

    def start(self, record: RequestRecord, prompt: str | None = None) -> str:
        """The request is admitted: from now on it has a row. Its name."""
        row = record.row = f"{self._link.worker}-{next(self._numbers)}"
        record.prompt = prompt
        self._running[row] = self._begun[row] = record
        if self._timer is None:
            self._plan_report()
        return row

    def end(self, record: RequestRecord) -> None:
        """The request is over, in whatever way. Does nothing twice for one that had a row."""
        used = record.usage
        if used is None or not used.prompt_tokens:
            used = record.usage_or_estimate()
        record.used = used
        if record.admission is not None:
            self._settle(record.admission, used)
        row = record.row
        if row is None:
            self._others[_alike(record)] += 1
        elif self._running.pop(row, None) is None:
            return
        elif self._begun.pop(row, None) is None:
            self._over.append(record)
        else:
            self._whole.append(_whole(record))
        if record.trace is not None:
            self._traced.append(Traced(record.trace, _whole(record)))
        if self._timer is None:
            self._plan_report()

    def close(self) -> None:
        """Say what is still to be said."""
        if self._timer is not None:
            self._timer.cancel()
        self.report()

    def _plan_report(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REPORT_INTERVAL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.report()

    def report(self) -> None:
        """Tell the manager all that has happened since the last time."""
        self._tell_shares()
        begun, self._begun = self._begun, {}
        over, self._over = self._over, []
        whole, self._whole = self._whole, []
        others, self._others = self._others, Counter()
        wall = time.time() - time.monotonic()
        batch = Batch(
            [_started(one, wall) for one in begun.values()],
            self._progress(),
            [_ended(one) for one in over],
            whole,
            [Other(*alike, count) for alike, count in others.items()],
            self._live(),
        )
        for record in over:
            self._reported.pop(record.row or "", None)
            self._told.pop(record.row or "", None)
        traced, self._traced = self._traced, []
        if batch != _NOTHING or traced:
            report = messages.ReportUsage(next(self._numbers), batch, traced)
            self._sent.append(report)
            self._link.send(report)
            self._give_up_oldest()
        if self._running or self._shares:
            self._plan_report()

    def _progress(self) -> list[RequestProgress]:
        """Of those whose count has changed since the last report."""
        found = []
        for row, record in self._running.items():
            usage = record.usage_or_estimate()
            if usage != self._reported.get(row, NO_USAGE):
                self._reported[row] = usage
                found.append(RequestProgress(row, usage))
        return found

    def _live(self) -> list[Live]:
        """Of those that have come further since the last report."""
        found = []
        for row, record in self._running.items():
            position = record.position if record.queued_seconds is None else None
            live = Live(row, record.queued_seconds, record.first_token_seconds, position)
            if live != self._told.get(row):
                self._told[row] = live
                found.append(live)
        return found

    def _give_up_oldest(self) -> None:
        while sum(report.batch.ends for report in self._sent) > MAX_WAITING_ROWS:
            lost = self._sent.popleft()
            logger.error("the ledger loses {} rows: no manager has taken them", lost.batch.ends)

    def _on_kept(self, kept: messages.UsageKept) -> None:
        while self._sent and self._sent[0].number <= kept.number:
            self._sent.popleft()

    # ── the connection ──

    def greet(self, hello: messages.Hello) -> None:
        """A manager that has not given them knows no shares: what was taken from them is announced one by one."""
        for number, (share, reserved) in self._taken.items():
            self._admitted[number] = quota_messages.AdmittedRequest(number, share.key_id, reserved)
        self._taken.clear()
        self._shares.clear()
        self._left.clear()
        hello.admitted = list(self._admitted.values())

    def connected(self) -> None:
        for report in self._sent:
            self._link.send(report)
