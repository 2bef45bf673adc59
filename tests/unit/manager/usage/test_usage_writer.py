"""Reports of workers on their way to the ledger, on a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llm_api_server.config.models import StorageConfig
from llm_api_server.errors import StoreError
from llm_api_server.ipc import messages
from llm_api_server.ipc.usage_events import WORKER_LOST, Batch, RequestEnded, RequestProgress, RequestStarted, Usage
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.usage.usage_writer import UsageWriter
from llm_api_server.manager.worker_session import WorkerSessions
from llm_api_server.store.database import Database
from llm_api_server.store.usage import UsageLedger
from tests.manager_doubles import FakeWorkerSession, StoreFile
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def nothing_spent(_key_id: str) -> tuple[int, int]:
    return 0, 0


@pytest.fixture
def ledger(store: StoreFile) -> UsageLedger:
    """As the manager has it open."""
    return UsageLedger(Database(f"sqlite:///{store.path}"))


def build(executor: StoreExecutor, ledger: UsageLedger, sessions: WorkerSessions, **options: Any) -> UsageWriter:
    return UsageWriter(
        executor,
        ledger,
        StorageConfig(),
        sessions=sessions,
        admissions=AdmissionController(nothing_spent, lambda _key, _limit: None),
        counters=Counters(),
        tracing=Tracing(),
        is_store_up=lambda: True,
        retry_interval=0.02,
        max_tries=3,
        **options,
    )


@pytest.fixture
async def writer(executor: StoreExecutor, ledger: UsageLedger, sessions: WorkerSessions) -> AsyncIterator[UsageWriter]:
    one = build(executor, ledger, sessions, return_timeout=0.05)
    one.start()
    yield one
    await one.close()


@pytest.fixture
def worker(sessions: WorkerSessions) -> FakeWorkerSession:
    one = FakeWorkerSession("w")
    sessions.add(one)
    return one


def started(row: str, key_id: str = "id") -> RequestStarted:
    return RequestStarted(row, "req", key_id, "ann", "m", "/v1/completions", stream=False, at=time.time())


def ended(row: str, usage: Usage) -> RequestEnded:
    return RequestEnded(row, 200, None, "i", usage, 0.1, 0.2, 0.3)


async def test_a_report_is_kept_while_the_database_is_locked(
    executor: StoreExecutor,
    ledger: UsageLedger,
    sessions: WorkerSessions,
    worker: FakeWorkerSession,
    store: StoreFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = build(executor, ledger, sessions)
    tries: list[str] = []
    write = ledger.write

    def counted(batch: Batch, name: str) -> None:
        tries.append(name)
        write(batch, name)

    monkeypatch.setattr(ledger, "write", counted)
    writer.start()
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        writer.report(worker, messages.ReportUsage(1, Batch([started("r")], [], [ended("r", Usage(5, 5))])))
        await until(lambda: tries)
        assert not worker.of(messages.UsageKept)
        other.execute("ROLLBACK")
    other.close()
    await until(lambda: worker.of(messages.UsageKept))
    assert [(one.requests, one.prompt_tokens) for one in store.sums()] == [(1, 5)]
    await writer.close()


async def test_rows_of_a_lost_worker_count_with_the_usage_last_reported(
    writer: UsageWriter, sessions: WorkerSessions, worker: FakeWorkerSession, store: StoreFile
) -> None:
    batch = Batch(
        [started("a"), started("b"), started("c")], [RequestProgress("a", Usage(7, 3))], [ended("b", Usage(1, 1))]
    )
    writer.report(worker, messages.ReportUsage(1, batch))
    sessions.remove(worker)
    writer.disconnect(worker)
    await until(lambda: [one for one in store.sums() if one.requests == 3])
    (found,) = store.sums()
    assert (found.prompt_tokens, found.completion_tokens, found.errors) == (8, 4, 2)
    rows = {row.row: row.error for row in store.ledger.rows(limit=10)}
    assert rows == {"a": WORKER_LOST, "b": None, "c": WORKER_LOST}


async def test_a_worker_that_reconnects_is_not_lost(
    writer: UsageWriter, sessions: WorkerSessions, worker: FakeWorkerSession, store: StoreFile
) -> None:
    writer.report(worker, messages.ReportUsage(1, Batch([started("a")])))
    sessions.remove(worker)
    writer.disconnect(worker)
    is_over = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, is_over.set)  # after the writer's own timer
    again = FakeWorkerSession()
    sessions.add(again)
    await is_over.wait()
    writer.report(again, messages.ReportUsage(2, Batch(ended=[ended("a", Usage(2, 2))])))
    await until(lambda: again.of(messages.UsageKept))
    assert [row.error for row in store.ledger.rows(limit=10)] == [None]


async def test_a_report_that_the_database_never_takes_does_not_stop_others(
    writer: UsageWriter,
    worker: FakeWorkerSession,
    ledger: UsageLedger,
    store: StoreFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = ledger.write

    def refuse(batch: Batch, name: str) -> None:
        if batch.started[0].row == "poison":
            raise StoreError("The database takes no such value.")
        if batch.started[0].row == "fault":
            raise TypeError("a fault of ours")
        write(batch, name)

    monkeypatch.setattr(ledger, "write", refuse)
    for number, row in enumerate(("poison", "fault", "good"), 1):
        writer.report(worker, messages.ReportUsage(number, Batch([started(row)], [], [ended(row, Usage(1, 1))])))
    await until(lambda: len(worker.of(messages.UsageKept)) == 3)
    assert [row.row for row in store.ledger.rows(limit=10)] == ["good"]


async def test_closing_writes_the_last_reports(
    executor: StoreExecutor, ledger: UsageLedger, sessions: WorkerSessions, worker: FakeWorkerSession, store: StoreFile
) -> None:
    writer = build(executor, ledger, sessions)
    writer.start()
    writer.report(worker, messages.ReportUsage(1, Batch([started("a")], [], [ended("a", Usage(2, 2))])))
    sessions.remove(worker)
    writer.disconnect(worker)
    await writer.close()
    assert [one.completion_tokens for one in store.sums()] == [2]
