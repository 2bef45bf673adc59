"""Keys of the store and the ledger, for all workers, beside the count of their limits. On the manager's one loop.

`server.py` calls the methods that take a `WorkerSession`. Limits are counted by `admissions`; the database is asked
in threads
(`store_threads.py`), and while it cannot be reached, keys that were seen and everything else go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from llm_api_server.auth.access import Key
from llm_api_server.config.models import StorageConfig
from llm_api_server.errors import StoreError, StoreUnavailable
from llm_api_server.ipc.messages import FindKey, KeyFound, KeysChanged, Refused, ReportUsage, UsageKept
from llm_api_server.ipc.quota_messages import AdmittedRequest
from llm_api_server.ipc.usage_events import Batch, OpenRequest, RequestProgress
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.snapshot import QuotaSnapshot
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.spans import Tracing
from llm_api_server.manager.usage.open_requests import OpenRequests
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

#: Seconds between two looks for changed keys.
POLL_INTERVAL = 0.25
#: Seconds between two tries to write to a database that cannot be reached.
RETRY_INTERVAL = 1.0
#: Seconds that a worker that was lost has to come back before its requests count as lost.
RETURN_TIMEOUT = 5.0
#: Seconds between two rounds of house-keeping; the first comes as soon as workers have had the time to connect.
HOUSEKEEPING_INTERVAL = 3600.0
CLOSE_TIMEOUT = 5.0
#: Seconds between two writes of how far running requests are.
PROGRESS_INTERVAL = 2.0
#: How often a report is tried to be written to a database that answers and does not take it.
MAX_TRIES = 600
MAX_REMEMBERED_KEYS = 100_000
MAX_WAITING_REPORTS = 100_000


@dataclass
class _Progress:
    """What a worker said of its running requests and is not written yet."""

    rows: dict[str, RequestProgress] = field(default_factory=dict)
    due_at: float = 0.0


class UsageWriter:
    """Built by `main`; `start` begins, `close` writes what is left."""

    def __init__(
        self,
        database: Database,
        storage: StorageConfig,
        minutes: Path,
        tally: Counters,
        tracing: Tracing,
    ) -> None:
        """`minutes` is the file for what keys used in the last minute."""
        self._threads = StoreExecutor(database)
        self._keys = Keys(database)
        self._ledger = UsageLedger(database)
        self._storage = storage
        self.admissions = AdmissionController(self._threads, self._ledger, self._keep, tally.limit_hit)
        self._tally = tally
        self._tracing = tracing
        self._minutes = QuotaSnapshot(minutes, self.admissions)
        self._workers: dict[WorkerSession, str] = {}
        self._remembered: OrderedDict[str, Key] = OrderedDict()
        self._revision: int | None = None
        self._lost_since: float | None = None
        self._rows = OpenRequests()
        self._progress: dict[str, _Progress] = {}
        self._reports: deque[tuple[WorkerSession | None, str, int, Batch]] = deque()
        self._has_reports = asyncio.Event()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._minutes.restore()
        for loop in (self._poll, self._write, self._keep_house, self._minutes.run):
            self._loops.append(asyncio.create_task(_restarted(loop)))

    async def close(self) -> None:
        """Write what workers said last; what cannot be written is lost, and the log says how much."""
        for name in self._rows.workers():
            self._lose(name)
        poll, write, *others = self._loops
        for task in (poll, *others):
            task.cancel()
        await self._minutes.save()
        self._is_closing = True
        self._has_reports.set()
        await asyncio.wait({write}, timeout=CLOSE_TIMEOUT)
        write.cancel()
        if self._reports:
            rows = sum(batch.ends for _, _, _, batch in self._reports)
            logger.error("the ledger loses {} rows: the database could not be written", rows)
        self._threads.close()

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, client: WorkerSession, name: str, admitted: list[AdmittedRequest]) -> None:
        self._workers[client] = name
        self.admissions.hello(client, admitted)

    def configure(self, storage: StorageConfig) -> None:
        """Its database stays what it is."""
        self._storage = storage

    def disconnected(self, client: WorkerSession) -> None:
        """What it held is free at once. Its rows wait a little: it may only have lost the connection."""
        name = self._workers.pop(client, None)
        if name is not None:
            self.admissions.disconnected(client)
            asyncio.get_running_loop().call_later(RETURN_TIMEOUT, self._lose, name)

    def _lose(self, name: str) -> None:
        """The rows of a worker that has not come back are settled with what it had told of them."""
        if name in self._workers.values():
            return
        self._progress.pop(name, None)
        self._tally.forget(name)
        ended, tokens = self._rows.lose(name, time.time())
        if not ended:
            return
        logger.warning("a worker was lost with {} requests: they count as far as it had told", len(ended))
        self.admissions.add_spent(tokens)
        self._tally.settle(ended)
        self._queue(None, name, 0, Batch(ended=[end for _, end in ended]))

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def find_key(self, client: WorkerSession, question: FindKey) -> None:
        self._keep(self._find_key(client, question))

    async def _find_key(self, client: WorkerSession, question: FindKey) -> None:
        name = question.digest or f"id:{question.key_id}"
        try:
            key = await self._threads.read(self._keys.find, digest=question.digest, key_id=question.key_id)
        except StoreError as error:
            self._note_lost(str(error))
            key = self._remembered.get(name)
            if key is None or self._is_grace_over():
                message = "The keys cannot be looked up just now; try again in a moment."
                client.send(Refused(question.request, StoreUnavailable.code or "", message, retry_after=5))
                return
        else:
            self._remember(name, key)
        client.send(KeyFound(question.request, key))

    def _remember(self, name: str, key: Key | None) -> None:
        if key is None:
            self._remembered.pop(name, None)
            return
        self._remembered[name] = key
        self._remembered.move_to_end(name)
        if len(self._remembered) > MAX_REMEMBERED_KEYS:
            self._remembered.popitem(last=False)

    async def _poll(self) -> None:
        """Tell the workers which keys have changed, and that keys must no longer be trusted when grace is over."""
        is_told = False
        while True:
            try:
                known, changed = self._revision, list[str]()
                if known is None:
                    revision = await self._threads.read(self._keys.revision)
                else:
                    revision, changed = await self._threads.read(self._keys.changed_since, known)
                self._revision = revision
            except StoreError as error:
                self._note_lost(str(error))
                if self._is_grace_over() and not is_told:
                    is_told = True
                    self._tell(KeysChanged())
            else:
                self._note_found()
                is_told = False
                if known is not None and revision < known:  # another database is in its place
                    self._tell(KeysChanged())
                elif changed:
                    self._tell(KeysChanged(changed))
            await asyncio.sleep(POLL_INTERVAL)

    def _tell(self, message: KeysChanged) -> None:
        for client in self._workers:
            client.send(message)

    @property
    def is_store_up(self) -> bool:
        return self._lost_since is None

    @property
    def waiting_reports(self) -> int:
        """That are not in the database."""
        return len(self._reports)

    def _note_lost(self, reason: str) -> None:
        if self._lost_since is None and not self._is_closing:
            self._lost_since = time.monotonic()
            logger.error(
                "the database cannot be used: {} The configuration's keys go on, others seen before for {:.0f} s more.",
                reason,
                self._storage.key_grace,
            )

    def _note_found(self) -> None:
        if self._lost_since is not None:
            logger.info("the database is back after {:.1f} s", time.monotonic() - self._lost_since)
            self._lost_since = None

    def _is_grace_over(self) -> bool:
        return self._lost_since is not None and time.monotonic() - self._lost_since > self._storage.key_grace

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────

    def report(self, client: WorkerSession, report: ReportUsage) -> None:
        name = self._workers.get(client)
        if name is not None:
            ended = self._rows.note(name, report.batch)
            if self._tally.report(name, report.number, report.batch, ended):
                self._tracing.over(report.traced)
            self._queue(client, name, report.number, self._with_progress_due(name, report.batch))

    def open_requests(self) -> list[OpenRequest]:
        """What runs, by what the workers have told, the oldest first."""
        return self._rows.open()

    def _with_progress_due(self, worker: str, batch: Batch) -> Batch:
        """How far requests are is remembered at once and written seldom: it counts when this manager is killed, too."""
        late = self._progress.setdefault(worker, _Progress())
        late.rows.update((said.row, said) for said in batch.progress)
        for ended in batch.ended:
            late.rows.pop(ended.row, None)
        now = time.monotonic()
        due: list[RequestProgress] = []
        if late.rows and now >= late.due_at:
            due, late.rows, late.due_at = list(late.rows.values()), {}, now + PROGRESS_INTERVAL
        return Batch(batch.started, due, batch.ended, batch.whole)

    def _queue(self, client: WorkerSession | None, worker: str, number: int, batch: Batch) -> None:
        self._reports.append((client, worker, number, batch))
        self._has_reports.set()
        if len(self._reports) > MAX_WAITING_REPORTS:
            lost = self._reports.popleft()[3]
            logger.error("the ledger loses {} rows: the database could not be written", lost.ends)

    async def _write(self) -> None:
        """One report after the other."""
        while self._reports or not self._is_closing:
            await self._has_reports.wait()
            while self._reports:
                client, worker, number, batch = self._reports[0]
                if batch.has_rows:
                    await self._write_one(batch, worker)
                self._reports.popleft()
                if client in self._workers and client is not None:
                    client.send(UsageKept(number))
            self._has_reports.clear()

    async def _write_one(self, batch: Batch, worker: str) -> None:
        """Again and again while the database takes nothing; what it never takes must not keep all else from it."""
        tries = 0
        while True:
            try:
                await self._threads.write(self._ledger.write, batch, worker)
            except StoreError as error:
                tries += 1
                if tries == 1:
                    logger.warning("usage cannot be written just now, it is kept and tried again: {}", error)
                if tries > MAX_TRIES and self._lost_since is None:
                    logger.error("the ledger loses {} rows: the database does not take them", batch.ends)
                    return
            except Exception:  # noqa: BLE001 - a fault of ours in one report must not stop the ledger
                logger.exception("the ledger loses {} rows", batch.ends)
                return
            else:
                return
            await asyncio.sleep(RETRY_INTERVAL)

    async def _keep_house(self) -> None:
        """Settle rows that nobody will settle any more, and forget what has been kept long enough."""
        await asyncio.sleep(RETURN_TIMEOUT)
        while True:
            storage = self._storage
            with contextlib.suppress(StoreError):  # told by those who ask more often
                present = {*self._workers.values(), *self._rows.workers()}
                count = await self._threads.write(self._ledger.settle_lost, except_workers=present)
                if count:
                    logger.warning("{} requests of workers that are gone count as far as they had told", count)
                await self._threads.write(
                    self._ledger.prune, time.time(), storage.keep_requests, storage.keep_hours, storage.keep_days
                )
            self.admissions.forget_idle()
            await asyncio.sleep(HOUSEKEEPING_INTERVAL)

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        """Run it to its end; the loop itself would forget it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _restarted(loop: Callable[[], Coroutine[None, None, None]]) -> None:
    """Until it ends by itself: what nobody foresaw is logged, and the loop goes on."""
    while True:
        try:
            await loop()
        except Exception:  # noqa: BLE001 - the edge of the task
            logger.exception("a fault in the accounts")
            await asyncio.sleep(RETRY_INTERVAL)
        else:
            return
