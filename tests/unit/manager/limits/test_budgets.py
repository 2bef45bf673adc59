"""Budgets of a day and a month start from what the database has, on a real SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable

import pytest

from llm_api_server.auth.access import Limits
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.quota_messages import Admit, AdmittedRequest, Settle
from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.store.database import Database
from llm_api_server.store.usage import UsageLedger
from tests.manager_doubles import FakeWorkerSession, StoreFile
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def spent(executor: StoreExecutor, store: StoreFile) -> Callable[[str], Awaitable[tuple[int, int]]]:
    ledger = UsageLedger(Database(f"sqlite:///{store.path}"))

    async def spent(key_id: str) -> tuple[int, int]:
        return await executor.write(ledger.spent, key_id, time.time())

    return spent


@pytest.fixture
def admissions(spent: Callable[[str], Awaitable[tuple[int, int]]]) -> AdmissionController:
    return AdmissionController(spent, lambda _key, _limit: None)


@pytest.fixture
def worker(admissions: AdmissionController) -> FakeWorkerSession:
    one = FakeWorkerSession()
    admissions.register(one, [])
    return one


async def test_requests_are_admitted_settled_and_released_with_their_worker(admissions: AdmissionController) -> None:
    first, second = FakeWorkerSession(), FakeWorkerSession()
    admissions.register(first, [])
    admissions.register(second, [])
    limits = Limits(max_concurrent=2)
    for worker, number in ((first, 1), (second, 1), (second, 2)):
        admissions.admit(worker, Admit(number, "id", "ann", limits))
    assert [type(one) for one in (*first.sent, *second.sent)] == [
        quota_messages.Admitted,
        quota_messages.Admitted,
        messages.Refused,
    ]
    admissions.settle(second, Settle(1, 0))
    admissions.settle(second, Settle(1, 0))
    admissions.settle(second, Settle(7, 0))
    admissions.admit(second, Admit(3, "id", "ann", limits))
    admissions.disconnect(first)
    admissions.admit(second, Admit(4, "id", "ann", limits))
    admissions.admit(second, Admit(5, "id", "ann", limits))
    assert [type(one) for one in second.sent[2:]] == [
        quota_messages.Admitted,
        quota_messages.Admitted,
        messages.Refused,
    ]


async def test_a_new_manager_counts_running_requests(admissions: AdmissionController) -> None:
    worker = FakeWorkerSession()
    admissions.register(worker, [AdmittedRequest(9, "id", 10)])
    admissions.admit(worker, Admit(10, "id", "ann", Limits(max_concurrent=1)))
    admissions.settle(worker, Settle(9, 5))
    admissions.admit(worker, Admit(11, "id", "ann", Limits(max_concurrent=1)))
    assert [type(one) for one in worker.sent] == [messages.Refused, quota_messages.Admitted]


async def test_budgets_include_earlier_usage(
    admissions: AdmissionController, worker: FakeWorkerSession, store: StoreFile
) -> None:
    started = RequestStarted("r", "req", "id", "ann", "m", "/v1/completions", stream=False, at=time.time())
    ended = RequestEnded("r", 200, None, "i", Usage(50, 30), 0.1, 0.2, 0.3)
    store.ledger.write(Batch([started], [], [ended]), "w0")
    limits = Limits(tokens_per_day=100)
    admissions.admit(worker, Admit(1, "id", "ann", limits, tokens=10, optional_tokens=50))
    await until(lambda: worker.sent)
    assert worker.of(quota_messages.Admitted)[0].reserved == 20
    admissions.settle(worker, Settle(1, 15))
    admissions.admit(worker, Admit(2, "id", "ann", limits, tokens=10))
    await until(lambda: len(worker.sent) == 2)
    assert worker.of(messages.Refused)[0].code == "insufficient_quota"


async def test_a_request_cancelled_during_the_look_up_counts_nothing(
    admissions: AdmissionController, worker: FakeWorkerSession
) -> None:
    limits = Limits(tokens_per_day=100, max_concurrent=1)
    admissions.admit(worker, Admit(1, "id", "ann", limits))
    admissions.settle(worker, Settle(1, 0))
    admissions.admit(worker, Admit(2, "id", "ann", limits))
    await until(lambda: worker.sent)
    assert [(type(one), one.request) for one in worker.sent] == [(quota_messages.Admitted, 2)]


async def test_requests_are_admitted_while_the_store_is_locked(
    spent: Callable[[str], Awaitable[tuple[int, int]]], store: StoreFile
) -> None:
    admissions, worker = AdmissionController(spent, lambda _key, _limit: None, spent_timeout=0.1), FakeWorkerSession()
    admissions.register(worker, [])
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        admissions.admit(worker, Admit(1, "id", "ann", Limits(tokens_per_day=100), tokens=10))
        await until(lambda: worker.of(quota_messages.Admitted))
        other.execute("ROLLBACK")
    other.close()
