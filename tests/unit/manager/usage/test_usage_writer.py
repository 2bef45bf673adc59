"""The manager's count of keys, limits and usage, on a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.auth.access import Limits, digest
from llm_api_server.config.models import StorageConfig
from llm_api_server.errors import StoreError
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.quota_messages import AdmittedRequest
from llm_api_server.ipc.usage_events import WORKER_LOST, Batch, RequestEnded, RequestProgress, RequestStarted, Usage
from llm_api_server.manager.limits import admission
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.spans import Tracing
from llm_api_server.manager.usage import usage_writer as module
from llm_api_server.manager.usage.usage_writer import UsageWriter
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Actor, KeyFields, Keys
from llm_api_server.store.usage import UsageLedger, UsageQuery
from tests.waiting import until

pytestmark = pytest.mark.anyio

ANN = Actor("cli:ann", None, None)
NO_ONE = "0" * 64


class FakeClient:
    """Keeps what it is sent."""

    is_worker = True
    pid = 0

    def __init__(self) -> None:
        self.grants: dict[str, int] = {}
        self.running: dict[str, list[str]] = {}
        self.reading: dict[int, tuple[str, int]] = {}
        self.in_flight: dict[str, int] = {}
        self.blocked: dict[str, int] = {}
        self.got: list[Any] = []

    def send(self, message: messages.ToClient) -> None:
        self.got.append(message)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.got if isinstance(message, kind)]


class Store:
    """The same file, opened by somebody else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = Database(f"sqlite:///{path}")
        self.keys = Keys(self.database)
        self.ledger = UsageLedger(self.database)

    def sums(self) -> list[Any]:
        now = time.time()
        return self.ledger.query(UsageQuery(since=now - 86400, until=now + 86400, group_by=("key",)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    one = Store(tmp_path / "store.db")
    one.database.open()
    return one


@pytest.fixture
async def accounts(store: Store, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[UsageWriter]:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(module, "RETRY_INTERVAL", 0.02)
    monkeypatch.setattr(module, "RETURN_TIMEOUT", 0.05)
    one = make(store)
    one.start()
    await until(lambda: one._revision is not None)
    yield one
    await one.close()


def make(store: Store, grace: float = 3600) -> UsageWriter:
    database = Database(f"sqlite:///{store.path}")
    storage = StorageConfig(key_grace=grace)
    return UsageWriter(database, storage, store.path.with_name("minutes"), Counters(), Tracing())


@pytest.fixture
async def client(accounts: UsageWriter) -> FakeClient:
    one = FakeClient()
    accounts.hello(one, "w", [])
    return one


def started(row: str, key_id: str = "id") -> RequestStarted:
    return RequestStarted(row, "req", key_id, "ann", "m", "/v1/completions", stream=False, at=time.time())


def ended(row: str, usage: Usage) -> RequestEnded:
    return RequestEnded(row, 200, None, "i", usage, 0.1, 0.2, 0.3)


async def test_keys_are_found_by_digest_and_id_and_changes_are_told(
    accounts: UsageWriter, client: FakeClient, store: Store
) -> None:
    record, secret = store.keys.create(KeyFields(name="ann", permissions=["chat"]), ANN)
    for number, question in enumerate(
        ({"digest": digest(secret)}, {"key_id": record.key.key_id}, {"digest": NO_ONE}), 1
    ):
        accounts.find_key(client, messages.FindKey(number, **question))
    await until(lambda: len(client.of(messages.KeyFound)) == 3)
    assert [one.key.name if one.key else None for one in client.of(messages.KeyFound)] == ["ann", "ann", None]
    await until(lambda: client.of(messages.KeysChanged))
    client.got.clear()
    store.keys.update("ann", KeyFields(enabled=False), ANN)
    await until(lambda: client.of(messages.KeysChanged))
    assert client.of(messages.KeysChanged)[0].ids == [record.key.key_id]


async def test_a_lost_store_leaves_keys_that_were_seen_until_grace_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.02)
    record, _ = store.keys.create(KeyFields(name="ann"), ANN)
    accounts, client = make(store, grace=0.3), FakeClient()
    accounts.hello(client, "w", [])
    accounts.start()
    accounts.find_key(client, messages.FindKey(1, key_id=record.key.key_id))
    await until(lambda: client.of(messages.KeyFound))
    store.database.close()
    for path in store.path.parent.glob("store.db*"):
        path.unlink()
    store.path.mkdir()
    await until(lambda: accounts._lost_since is not None)
    client.got.clear()
    accounts.find_key(client, messages.FindKey(2, key_id=record.key.key_id))
    accounts.find_key(client, messages.FindKey(3, key_id="another"))
    await until(lambda: len(client.got) == 2)
    assert [(type(one), one.request) for one in client.got] == [(messages.KeyFound, 2), (messages.Refused, 3)]
    assert client.got[1].code == "store_unavailable"
    await until(lambda: client.of(messages.KeysChanged))
    accounts.find_key(client, messages.FindKey(4, key_id=record.key.key_id))
    await until(lambda: len(client.of(messages.Refused)) == 2)
    store.path.rmdir()
    await until(lambda: accounts._lost_since is None)
    await accounts.close()


async def test_requests_are_admitted_settled_and_free_when_their_worker_goes(accounts: UsageWriter) -> None:
    first, second = FakeClient(), FakeClient()
    accounts.hello(first, "one", [])
    accounts.hello(second, "two", [])
    limits = Limits(max_concurrent=2)
    for client, number in ((first, 1), (second, 1), (second, 2)):
        accounts.admissions.admit(client, quota_messages.Admit(number, "id", "ann", limits))
    assert [type(one) for one in (*first.got, *second.got)] == [
        quota_messages.Admitted,
        quota_messages.Admitted,
        messages.Refused,
    ]
    accounts.admissions.settle(second, 1, 0)
    accounts.admissions.settle(second, 1, 0)
    accounts.admissions.settle(second, 7, 0)
    accounts.admissions.admit(second, quota_messages.Admit(3, "id", "ann", limits))
    accounts.disconnected(first)
    accounts.admissions.admit(second, quota_messages.Admit(4, "id", "ann", limits))
    accounts.admissions.admit(second, quota_messages.Admit(5, "id", "ann", limits))
    assert [type(one) for one in second.got[2:]] == [quota_messages.Admitted, quota_messages.Admitted, messages.Refused]


async def test_a_new_manager_counts_what_runs(accounts: UsageWriter) -> None:
    client = FakeClient()
    accounts.hello(client, "w", [AdmittedRequest(9, "id", 10)])
    accounts.admissions.admit(client, quota_messages.Admit(10, "id", "ann", Limits(max_concurrent=1)))
    accounts.admissions.settle(client, 9, 5)
    accounts.admissions.admit(client, quota_messages.Admit(11, "id", "ann", Limits(max_concurrent=1)))
    assert [type(one) for one in client.got] == [messages.Refused, quota_messages.Admitted]


async def test_budgets_know_what_was_used_before(accounts: UsageWriter, client: FakeClient, store: Store) -> None:
    store.ledger.write(Batch([started("r")], [], [ended("r", Usage(50, 30))]), "w0")
    limits = Limits(tokens_per_day=100)
    accounts.admissions.admit(client, quota_messages.Admit(1, "id", "ann", limits, tokens=10, optional_tokens=50))
    await until(lambda: client.got)
    assert client.of(quota_messages.Admitted)[0].reserved == 20
    accounts.admissions.settle(client, 1, 15)
    accounts.admissions.admit(client, quota_messages.Admit(2, "id", "ann", limits, tokens=10))
    await until(lambda: len(client.got) == 2)
    assert client.of(messages.Refused)[0].code == "insufficient_quota"


async def test_a_question_that_is_taken_back_while_the_store_is_asked_counts_nothing(
    accounts: UsageWriter, client: FakeClient
) -> None:
    limits = Limits(tokens_per_day=100, max_concurrent=1)
    accounts.admissions.admit(client, quota_messages.Admit(1, "id", "ann", limits))
    accounts.admissions.settle(client, 1, 0)
    accounts.admissions.admit(client, quota_messages.Admit(2, "id", "ann", limits))
    await until(lambda: client.got)
    assert [(type(one), one.request) for one in client.got] == [(quota_messages.Admitted, 2)]


async def test_limits_hold_while_the_store_is_locked_and_rows_are_kept_after_it(
    accounts: UsageWriter, client: FakeClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "BASE_TIMEOUT", 0.1)
    await until(lambda: accounts._revision is not None)
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        accounts.report(client, messages.ReportUsage(1, Batch([started("r")], [], [ended("r", Usage(5, 5))])))
        accounts.admissions.admit(client, quota_messages.Admit(1, "id", "ann", Limits(tokens_per_day=100), tokens=10))
        await until(lambda: client.of(quota_messages.Admitted))
        assert not client.of(messages.UsageKept)
        other.execute("ROLLBACK")
    other.close()
    await until(lambda: client.of(messages.UsageKept))
    assert [(one.requests, one.prompt_tokens) for one in store.sums()] == [(1, 5)]


async def test_rows_of_a_lost_worker_count_as_far_as_it_had_told(
    accounts: UsageWriter, client: FakeClient, store: Store
) -> None:
    batch = Batch(
        [started("a"), started("b"), started("c")], [RequestProgress("a", Usage(7, 3))], [ended("b", Usage(1, 1))]
    )
    accounts.report(client, messages.ReportUsage(1, batch))
    accounts.disconnected(client)
    await until(lambda: [one for one in store.sums() if one.requests == 3])
    (found,) = store.sums()
    assert (found.prompt_tokens, found.completion_tokens, found.errors) == (8, 4, 2)
    rows = {row.row: row.error for row in store.ledger.rows(limit=10)}
    assert rows == {"a": WORKER_LOST, "b": None, "c": WORKER_LOST}


async def test_a_worker_that_comes_back_is_not_lost(accounts: UsageWriter, client: FakeClient, store: Store) -> None:
    accounts.report(client, messages.ReportUsage(1, Batch([started("a")])))
    accounts.disconnected(client)
    again = FakeClient()
    accounts.hello(again, "w", [])
    await asyncio.sleep(0.2)
    accounts.report(again, messages.ReportUsage(2, Batch(ended=[ended("a", Usage(2, 2))])))
    await until(lambda: again.of(messages.UsageKept))
    assert [row.error for row in store.ledger.rows(limit=10)] == [None]


async def test_what_the_database_never_takes_does_not_stop_the_ledger(
    accounts: UsageWriter, client: FakeClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRIES", 3)
    write = accounts._ledger.write

    def refuse(batch: Batch, worker: str) -> None:
        if batch.started[0].row == "poison":
            raise StoreError("The database takes no such value.")
        if batch.started[0].row == "fault":
            raise TypeError("a fault of ours")
        write(batch, worker)

    monkeypatch.setattr(accounts._ledger, "write", refuse)
    for number, row in enumerate(("poison", "fault", "good"), 1):
        accounts.report(client, messages.ReportUsage(number, Batch([started(row)], [], [ended(row, Usage(1, 1))])))
    await until(lambda: len(client.of(messages.UsageKept)) == 3)
    assert [row.row for row in store.ledger.rows(limit=10)] == ["good"]


async def test_a_fault_in_a_loop_does_not_end_it(
    accounts: UsageWriter, client: FakeClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([TypeError("a fault of ours")])
    look = accounts._keys.changed_since

    def fail_once(revision: int) -> tuple[int, list[str]]:
        for fault in faults:
            raise fault
        return look(revision)

    monkeypatch.setattr(accounts._keys, "changed_since", fail_once)
    await asyncio.sleep(0.1)
    store.keys.create(KeyFields(name="ann"), ANN)
    await until(lambda: client.of(messages.KeysChanged))


async def test_closing_writes_what_was_said_last(store: Store) -> None:
    accounts, client = make(store), FakeClient()
    accounts.start()
    accounts.hello(client, "w", [])
    accounts.report(client, messages.ReportUsage(1, Batch([started("a")], [], [ended("a", Usage(2, 2))])))
    accounts.disconnected(client)
    await accounts.close()
    assert [one.completion_tokens for one in store.sums()] == [2]
