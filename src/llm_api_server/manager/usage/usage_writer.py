"""Writes the reports of all workers to the ledger, counts them, and settles the requests of lost workers.

Reports are written in the order of their arrival and kept while the database cannot be written. On the manager's one
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from loguru import logger

from llm_api_server.config.models import StorageConfig
from llm_api_server.errors import StoreError
from llm_api_server.event_loop.background import run_restarting
from llm_api_server.ipc.messages import ReportUsage, UsageKept
from llm_api_server.ipc.usage_events import Batch, OpenRequest, RequestProgress
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.usage.open_requests import OpenRequests
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from llm_api_server.store.usage import UsageLedger

#: Seconds between two tries to write to a database that cannot be reached.
RETRY_INTERVAL = 1.0
#: Seconds that a disconnected worker has to reconnect before its requests count as lost.
RETURN_TIMEOUT = 5.0
#: Seconds between two rounds of pruning; the first comes as soon as workers have had the time to connect.
HOUSEKEEPING_INTERVAL = 3600.0
CLOSE_TIMEOUT = 5.0
#: Seconds between two writes of the progress of running requests.
PROGRESS_INTERVAL = 2.0
#: Attempts to write one report while the database executes other statements.
MAX_TRIES = 600
MAX_WAITING_REPORTS = 100_000


@dataclass(frozen=True)
class _Report:
    """A batch to write; `client` gets a confirmation."""

    client: WorkerSession | None
    worker: str
    number: int
    batch: Batch


@dataclass
class _Progress:
    """Progress of a worker's running requests that is not written yet."""

    rows: dict[str, RequestProgress] = field(default_factory=dict)
    due_at: float = 0.0


class UsageWriter:
    """The queue of reports and the one task that writes them."""

    def __init__(
        self,
        executor: StoreExecutor,
        ledger: UsageLedger,
        storage: StorageConfig,
        *,
        sessions: WorkerSessions,
        admissions: AdmissionController,
        counters: Counters,
        tracing: Tracing,
        is_store_up: Callable[[], bool],
        retry_interval: float = RETRY_INTERVAL,
        return_timeout: float = RETURN_TIMEOUT,
        max_tries: int = MAX_TRIES,
    ) -> None:
        self._executor = executor
        self._ledger = ledger
        self._storage = storage
        self._admissions = admissions
        self._counters = counters
        self._tracing = tracing
        self._is_store_up = is_store_up
        self._retry_interval = retry_interval
        self._return_timeout = return_timeout
        self._max_tries = max_tries
        self._sessions = sessions
        self._rows = OpenRequests()
        self._progress: dict[str, _Progress] = {}
        self._reports: deque[_Report] = deque()
        self._has_reports = asyncio.Event()
        self._is_closing = False
        self._writer: asyncio.Task[None] | None = None
        self._housekeeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._writer = asyncio.create_task(run_restarting(self._write))
        self._housekeeper = asyncio.create_task(run_restarting(self._keep_house))

    async def close(self) -> None:
        """Write what is left within `CLOSE_TIMEOUT` and log how much is lost."""
        assert self._writer is not None
        assert self._housekeeper is not None
        for name in self._rows.workers():
            self._lose(name)
        self._housekeeper.cancel()
        self._is_closing = True
        self._has_reports.set()
        await asyncio.wait({self._writer}, timeout=CLOSE_TIMEOUT)
        self._writer.cancel()
        if self._reports:
            rows = sum(report.batch.ends for report in self._reports)
            logger.error("the ledger loses {} rows: the database could not be written", rows)

    def configure(self, storage: StorageConfig) -> None:
        """Apply the times to keep rows for; the database stays the same until a restart."""
        self._storage = storage

    def disconnect(self, worker: WorkerSession) -> None:
        """Settle the worker's rows unless it reconnects within the return timeout."""
        if worker.is_worker:
            asyncio.get_running_loop().call_later(self._return_timeout, self._lose, worker.name)

    def _lose(self, name: str) -> None:
        """Settle the rows of a worker that is not connected with the usage it last reported."""
        if name in self._sessions.names:
            return
        self._progress.pop(name, None)
        self._counters.forget(name)
        ended, finished = self._rows.lose(name, time.time())
        if not ended:
            return
        logger.warning("a worker was lost with {} requests: they count with the usage last reported", len(ended))
        tokens: Counter[str] = Counter()
        for one in finished:
            if one.key_id:
                tokens[one.key_id] += one.usage.prompt_tokens + one.usage.completion_tokens
        self._admissions.add_spent(tokens)
        self._counters.settle(finished)
        self._queue(_Report(None, name, 0, Batch(ended=ended)))

    def report(self, client: WorkerSession, report: ReportUsage) -> None:
        """Count a worker's report and queue it for the ledger."""
        if client.is_worker:
            name = client.name
            ended = self._rows.update(name, report.batch)
            if self._counters.report(name, report.number, report.batch, ended):
                self._tracing.finished(report.traced)
            self._queue(_Report(client, name, report.number, self._with_progress_due(name, report.batch)))

    def open_requests(self) -> list[OpenRequest]:
        """Return the running requests of all workers, the oldest first."""
        return self._rows.open()

    @property
    def waiting_reports(self) -> int:
        return len(self._reports)

    def _with_progress_due(self, worker: str, batch: Batch) -> Batch:
        """Replace the batch's progress by what is due: the ledger gets it seldom, for the case that all is killed."""
        pending = self._progress.setdefault(worker, _Progress())
        pending.rows.update((one.row, one) for one in batch.progress)
        for ended in batch.ended:
            pending.rows.pop(ended.row, None)
        now = time.monotonic()
        due: list[RequestProgress] = []
        if pending.rows and now >= pending.due_at:
            due, pending.rows, pending.due_at = list(pending.rows.values()), {}, now + PROGRESS_INTERVAL
        return Batch(batch.started, due, batch.ended, batch.finished)

    def _queue(self, report: _Report) -> None:
        self._reports.append(report)
        self._has_reports.set()
        if len(self._reports) > MAX_WAITING_REPORTS:
            lost = self._reports.popleft().batch
            logger.error("the ledger loses {} rows: the database could not be written", lost.ends)

    async def _write(self) -> None:
        """Write one report after the other and confirm it; return when closing and all are written."""
        while self._reports or not self._is_closing:
            await self._has_reports.wait()
            while self._reports:
                report = self._reports[0]
                if report.batch.has_rows:
                    await self._write_one(report.batch, report.worker)
                self._reports.popleft()
                if report.client is not None:
                    report.client.send(UsageKept(report.number))
            self._has_reports.clear()

    async def _write_one(self, batch: Batch, worker: str) -> None:
        """Retry while the database is away; drop a batch that a working database never takes, so others follow."""
        tries = 0
        while True:
            try:
                await self._executor.write(self._ledger.write, batch, worker)
            except StoreError as error:
                tries += 1
                if tries == 1:
                    logger.warning("usage cannot be written at the moment; it is kept and tried again: {}", error)
                if tries > self._max_tries and self._is_store_up():
                    logger.error("the ledger loses {} rows: the database does not take them", batch.ends)
                    return
            except Exception:  # noqa: BLE001 - a fault in one report must not stop the ledger
                logger.exception("the ledger loses {} rows", batch.ends)
                return
            else:
                return
            await asyncio.sleep(self._retry_interval)

    async def _keep_house(self) -> None:
        """Settle rows of workers that are gone for good, and prune what has been kept long enough."""
        await asyncio.sleep(self._return_timeout)
        while True:
            storage = self._storage
            with contextlib.suppress(StoreError):  # the key directory logs it
                present = self._sessions.names | self._rows.workers()
                count = await self._executor.write(self._ledger.settle_lost, except_workers=present)
                if count:
                    logger.warning("{} requests of lost workers count with the usage last reported", count)
                await self._executor.write(
                    self._ledger.prune, time.time(), storage.keep_requests, storage.keep_hours, storage.keep_days
                )
            self._admissions.forget_idle()
            await asyncio.sleep(HOUSEKEEPING_INTERVAL)
