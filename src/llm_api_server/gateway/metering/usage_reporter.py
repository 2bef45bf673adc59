"""Reports of what requests used, sent to the manager in batches, on the worker's loop.

A batch is kept here until the manager has it in the store, and is sent again after a loss of the connection. A worker
that is killed therefore loses at most the last `REPORT_INTERVAL`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque

from loguru import logger

from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.ipc.messages import ReportUsage, UsageKept
from llm_api_server.ipc.trace_context import TracedRequest
from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    Batch,
    FinishedRequest,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    RequestsWithoutRow,
    RunningState,
    Usage,
)

#: Seconds between two reports.
REPORT_INTERVAL = 0.5
#: Rows kept here while no manager takes them. Beyond it the oldest are dropped, with a log line.
MAX_WAITING_ROWS = 200_000
_EMPTY = Batch()


class UsageReporter:
    """Running requests of one worker, and the reports that no manager has confirmed yet."""

    def __init__(self, link: ManagerLink, interval: float = REPORT_INTERVAL) -> None:
        self._link = link
        self._interval = interval
        self._numbers = itertools.count(1)
        self._running: dict[str, RequestRecord] = {}
        #: The last progress reported of each running request.
        self._reported_usage: dict[str, Usage] = {}
        self._reported_live: dict[str, RunningState] = {}
        # Rows of the next report: only started, only ended, started and ended.
        self._started: dict[str, RequestRecord] = {}
        self._ended: list[RequestRecord] = []
        self._finished: list[FinishedRequest] = []
        self._others: Counter[tuple[str, str, str, int, str]] = Counter()
        self._traced: list[TracedRequest] = []
        self._unconfirmed: deque[ReportUsage] = deque()
        self._timer: asyncio.TimerHandle | None = None
        link.register({UsageKept: self._on_kept}, on_connected=self._resend)

    def start(self, record: RequestRecord, prompt: str | None = None) -> str:
        """Give an admitted request a row in the ledger, and return the name of the row."""
        row = record.row = f"{self._link.worker}-{next(self._numbers)}"
        record.prompt = prompt
        self._running[row] = self._started[row] = record
        if self._timer is None:
            self._plan_report()
        return row

    def end(self, record: RequestRecord) -> None:
        """Report a request that has ended, in whatever way, and set what it `used`.

        A second call for a request with a row has no effect.
        """
        used = record.usage
        if used is None or not used.prompt_tokens:
            used = record.usage_or_estimate()
        record.used = used
        row = record.row
        if row is None:
            self._others[_labels(record)] += 1
        elif self._running.pop(row, None) is None:
            return
        elif self._started.pop(row, None) is None:
            self._ended.append(record)
        else:
            self._finished.append(_finished(record))
        if record.trace is not None:
            self._traced.append(TracedRequest(record.trace, _finished(record)))
        if self._timer is None:
            self._plan_report()

    def close(self) -> None:
        """Send the last report."""
        if self._timer is not None:
            self._timer.cancel()
        self.report()

    def report(self) -> None:
        """Send everything that has happened since the last report."""
        started, self._started = self._started, {}
        ended, self._ended = self._ended, []
        finished, self._finished = self._finished, []
        others, self._others = self._others, Counter()
        epoch = time.time() - time.monotonic()
        batch = Batch(
            [_started(one, epoch) for one in started.values()],
            self._progress(),
            [_ended(one) for one in ended],
            finished,
            [RequestsWithoutRow(*labels, count) for labels, count in others.items()],
            self._live(),
        )
        for record in ended:
            self._reported_usage.pop(record.row or "", None)
            self._reported_live.pop(record.row or "", None)
        traced, self._traced = self._traced, []
        if batch != _EMPTY or traced:
            report = ReportUsage(next(self._numbers), batch, traced)
            self._unconfirmed.append(report)
            self._link.send(report)
            self._drop_oldest()
        if self._running:
            self._plan_report()

    def _plan_report(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.report()

    def _progress(self) -> list[RequestProgress]:
        """Return the usage of requests whose count has changed since the last report."""
        found = []
        for row, record in self._running.items():
            usage = record.usage_or_estimate()
            if usage != self._reported_usage.get(row, NO_USAGE):
                self._reported_usage[row] = usage
                found.append(RequestProgress(row, usage))
        return found

    def _live(self) -> list[RunningState]:
        """Return the state of requests whose state has changed since the last report."""
        found = []
        for row, record in self._running.items():
            position = record.position if record.queued_seconds is None else None
            live = RunningState(row, record.queued_seconds, record.first_token_seconds, position)
            if live != self._reported_live.get(row):
                self._reported_live[row] = live
                found.append(live)
        return found

    def _drop_oldest(self) -> None:
        while sum(report.batch.ends for report in self._unconfirmed) > MAX_WAITING_ROWS:
            lost = self._unconfirmed.popleft()
            logger.error("the ledger loses {} rows: no manager has taken them", lost.batch.ends)

    def _on_kept(self, message: UsageKept) -> None:
        while self._unconfirmed and self._unconfirmed[0].number <= message.number:
            self._unconfirmed.popleft()

    def _resend(self) -> None:
        for report in self._unconfirmed:
            self._link.send(report)


def _started(record: RequestRecord, epoch: float) -> RequestStarted:
    """`epoch` is the Unix time at zero of the clock of `started_at`."""
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
        at=epoch + record.started_at,
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


def _finished(record: RequestRecord) -> FinishedRequest:
    """Built when the request ends: building all of them at the time of a report would stall the loop."""
    key_id, key_name = (record.key.key_id, record.key.name) if record.key is not None else ("", "")
    return FinishedRequest(
        record.row or "", record.request_id, key_id, key_name, record.model or "", record.path, record.stream,
        time.time() - record.seconds, record.prompt, record.status, record.error, record.instance, record.used,
        record.queued_seconds, record.first_token_seconds, record.seconds,
    )  # fmt: skip


def _labels(record: RequestRecord) -> tuple[str, str, str, int, str]:
    """Return the fields of an `RequestsWithoutRow` before its count."""
    endpoint = record.path if record.path in ENDPOINTS else "other"
    key_name = record.key.name if record.key is not None else ""
    return endpoint, record.model or "", key_name, record.status or CLIENT_CLOSED_REQUEST, record.error or ""
