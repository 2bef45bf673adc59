"""Keys of the store, limits and the ledger, for all workers: the one place that counts. On the manager's one loop.

`server.py` calls the methods that take a `Client`. What a key may use is decided by `quotas.py`; the database is asked
in threads (`store_threads.py`), and while it cannot be reached, keys that were seen and everything else go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loguru import logger

from llm_api_server.access import Key
from llm_api_server.config import StorageConfig
from llm_api_server.control import (
    Admission,
    Admit,
    Admitted,
    FindKey,
    KeyFound,
    KeysChanged,
    Refused,
    ReportUsage,
    UsageKept,
)
from llm_api_server.errors import StoreError, StoreUnavailable
from llm_api_server.manager.open_rows import OpenRows
from llm_api_server.manager.quotas import Account, Refusal, Reservation
from llm_api_server.manager.store_threads import StoreThreads
from llm_api_server.store.keys import Keys
from llm_api_server.store.usage import UsageLedger
from llm_api_server.usage import Batch

if TYPE_CHECKING:
    from llm_api_server.manager.manager import Client

#: Seconds between two looks for changed keys.
POLL_INTERVAL = 0.25
#: Seconds that a budget waits for the database to tell what was used before; then it counts from now on.
BASE_TIMEOUT = 2.0
#: Seconds between two tries to write to a database that cannot be reached.
RETRY_INTERVAL = 1.0
#: Seconds that a worker that was lost has to come back before its requests count as lost.
RETURN_TIMEOUT = 5.0
#: Seconds between two rounds of house-keeping; the first comes as soon as workers have had the time to connect.
HOUSEKEEPING_INTERVAL = 3600.0
CLOSE_TIMEOUT = 5.0
#: How often a report is tried to be written to a database that answers and does not take it.
MAX_TRIES = 600
MAX_REMEMBERED_KEYS = 100_000
MAX_WAITING_REPORTS = 100_000


@dataclass
class _Opened:
    """An account, and the look-up of what its key used before."""

    account: Account = field(default_factory=Account)
    base: asyncio.Task[None] | None = None


@dataclass
class _Worker:
    """`admitted`: what it holds, by its own numbers; None while the answer is being found."""

    client: Client
    name: str = ""
    admitted: dict[int, tuple[str, Reservation] | None] = field(default_factory=dict)


class Accounts:
    """Built by `main`; `start` begins, `close` writes what is left."""

    def __init__(self, threads: StoreThreads, keys: Keys, ledger: UsageLedger, storage: StorageConfig) -> None:
        self._threads = threads
        self._keys = keys
        self._ledger = ledger
        self._storage = storage
        self._workers: dict[Client, _Worker] = {}
        self._opened: dict[str, _Opened] = {}
        self._remembered: OrderedDict[str, Key] = OrderedDict()
        self._revision: int | None = None
        self._lost_since: float | None = None
        self._rows = OpenRows()
        self._reports: deque[tuple[Client | None, str, int, Batch]] = deque()
        self._has_reports = asyncio.Event()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for loop in (self._poll, self._write, self._keep_house):
            self._loops.append(asyncio.create_task(_restarted(loop)))

    async def close(self) -> None:
        """Write what workers said last; what cannot be written is lost, and the log says how much."""
        for name in self._rows.workers():
            self._lose(name)
        poll, write, housekeeping = self._loops
        for task in (poll, housekeeping):
            task.cancel()
        self._is_closing = True
        self._has_reports.set()
        await asyncio.wait({write}, timeout=CLOSE_TIMEOUT)
        write.cancel()
        if self._reports:
            rows = sum(len(batch.ended) for _, _, _, batch in self._reports)
            logger.error("the ledger loses {} rows: the database could not be written", rows)
        self._threads.close()

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, client: Client, name: str, admitted: list[Admission]) -> None:
        """A worker is here; what an earlier manager admitted for it goes on being counted."""
        worker = self._workers[client] = _Worker(client, name)
        for one in admitted:
            reservation = self._account(one.key_id).restore(one.reserved)
            worker.admitted[one.request] = (one.key_id, reservation)

    def disconnected(self, client: Client) -> None:
        """What it held is free at once. Its rows wait a little: it may only have lost the connection."""
        worker = self._workers.pop(client, None)
        if worker is None:
            return
        for held in worker.admitted.values():
            if held is not None:
                self._settle(held, 0)
        asyncio.get_running_loop().call_later(RETURN_TIMEOUT, self._lose, worker.name)

    def _lose(self, name: str) -> None:
        """The rows of a worker that has not come back are settled with what it had told of them."""
        if any(worker.name == name for worker in self._workers.values()):
            return
        ended, tokens = self._rows.lose(name, time.time())
        if not ended:
            return
        logger.warning("a worker was lost with {} requests: they count as far as it had told", len(ended))
        for key_id, used in tokens.items():
            if key_id in self._opened:
                self._opened[key_id].account.add_spent(used, used, time.time())
        self._queue(None, name, 0, Batch(ended=ended))

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def find_key(self, client: Client, question: FindKey) -> None:
        self._keep(self._find_key(client, question))

    async def _find_key(self, client: Client, question: FindKey) -> None:
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
        for worker in self._workers.values():
            worker.client.send(message)

    def _note_lost(self, reason: str) -> None:
        if self._lost_since is None:
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

    # ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, client: Client, question: Admit) -> None:
        opened = self._opened.setdefault(question.key_id, _Opened())
        limits = question.limits
        if not question.counts:
            client.send(Admitted(question.request, opened.account.standing(limits, _now())))
            return
        worker = self._workers.get(client)
        if worker is None:
            return
        worker.admitted[question.request] = None
        has_budget = limits.tokens_per_day is not None or limits.tokens_per_month is not None
        if has_budget and (opened.base is None or not opened.base.done()):
            self._keep(self._admit_with_base(worker, question, opened))
        else:
            self._admit(worker, question, opened.account)

    async def _admit_with_base(self, worker: _Worker, question: Admit, opened: _Opened) -> None:
        if opened.base is None:
            opened.base = asyncio.create_task(self._open(question.key_id, opened))
        await asyncio.wait({opened.base}, timeout=BASE_TIMEOUT)
        self._admit(worker, question, opened.account)

    async def _open(self, key_id: str, opened: _Opened) -> None:
        """What the key used before this manager counted. Read behind all writes, so that nothing counts twice."""
        while True:
            try:
                of_day, of_month = await self._threads.write(self._ledger.spent, key_id, time.time())
            except StoreError:  # told by those who look for changes
                await asyncio.sleep(RETRY_INTERVAL)
            else:
                opened.account.add_spent(of_day, of_month, time.time())
                return

    def _admit(self, worker: _Worker, question: Admit, account: Account) -> None:
        number = question.request
        if number not in worker.admitted or worker.client not in self._workers:
            return  # it left meanwhile
        now = _now()
        found = account.admit(question.name, question.limits, (question.tokens, question.spare), now, time.time())
        standing = account.standing(question.limits, now)
        if isinstance(found, Refusal):
            del worker.admitted[number]
            worker.client.send(
                Refused(number, found.code, found.message, found.retry_after, found.should_retry, standing)
            )
        else:
            worker.admitted[number] = (question.key_id, found)
            worker.client.send(Admitted(number, standing, found.tokens))

    def settle(self, client: Client, request: int, tokens: int) -> None:
        worker = self._workers.get(client)
        held = worker.admitted.pop(request, None) if worker is not None else None
        if held is not None:
            self._settle(held, tokens)

    def _settle(self, held: tuple[str, Reservation], tokens: int) -> None:
        key_id, reservation = held
        self._account(key_id).settle(reservation, tokens, _now(), time.time())

    def _account(self, key_id: str) -> Account:
        return self._opened.setdefault(key_id, _Opened()).account

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────

    def report(self, client: Client, report: ReportUsage) -> None:
        worker = self._workers.get(client)
        if worker is not None:
            self._rows.note(worker.name, report.batch)
            self._queue(client, worker.name, report.number, report.batch)

    def _queue(self, client: Client | None, worker: str, number: int, batch: Batch) -> None:
        self._reports.append((client, worker, number, batch))
        self._has_reports.set()
        if len(self._reports) > MAX_WAITING_REPORTS:
            lost = self._reports.popleft()[3]
            logger.error("the ledger loses {} rows: the database could not be written", len(lost.ended))

    async def _write(self) -> None:
        """One report after the other."""
        while self._reports or not self._is_closing:
            await self._has_reports.wait()
            while self._reports:
                client, worker, number, batch = self._reports[0]
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
                    logger.error("the ledger loses {} rows: the database does not take them", len(batch.ended))
                    return
            except Exception:  # noqa: BLE001 - a fault of ours in one report must not stop the ledger
                logger.exception("the ledger loses {} rows", len(batch.ended))
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
                present = {worker.name for worker in self._workers.values()} | self._rows.workers()
                count = await self._threads.write(self._ledger.settle_lost, except_workers=present)
                if count:
                    logger.warning("{} requests of workers that are gone count as far as they had told", count)
                await self._threads.write(
                    self._ledger.prune, time.time(), storage.keep_requests, storage.keep_hours, storage.keep_days
                )
            self._forget_idle()
            await asyncio.sleep(HOUSEKEEPING_INTERVAL)

    def _forget_idle(self) -> None:
        now = _now()
        for key_id, opened in list(self._opened.items()):
            if opened.account.is_idle(now) and (opened.base is None or opened.base.done()):
                del self._opened[key_id]

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


def _now() -> float:
    """It does not jump."""
    return time.monotonic()
