"""Keys of the database as workers get them, on a real SQLite file."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from llm_api_server.auth.access import digest
from llm_api_server.ipc import messages
from llm_api_server.manager.usage.key_directory import KeyDirectory
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.worker_session import WorkerSessions
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys
from tests.manager_doubles import FakeWorkerSession, StoreFile
from tests.waiting import until

pytestmark = pytest.mark.anyio

ANN = Actor("cli:ann", None, None)
NO_ONE = "0" * 64


@pytest.fixture
def keys(store: StoreFile) -> Keys:
    """As the manager has it open."""
    return Keys(Database(f"sqlite:///{store.path}"))


@pytest.fixture
async def directory(executor: StoreExecutor, keys: Keys, sessions: WorkerSessions) -> AsyncIterator[KeyDirectory]:
    one = KeyDirectory(executor, keys, sessions, 3600, poll_interval=0.02)
    one.start()
    await until(lambda: one._revision is not None)
    yield one
    one.close()


@pytest.fixture
def worker(sessions: WorkerSessions) -> FakeWorkerSession:
    one = FakeWorkerSession()
    sessions.add(one)
    return one


async def test_keys_are_found_by_digest_and_by_id(
    directory: KeyDirectory, worker: FakeWorkerSession, store: StoreFile
) -> None:
    record, secret = store.keys.create(KeyFields(name="ann", permissions=["chat"]), ANN)
    wanted = ({"digest": digest(secret)}, {"key_id": record.key.key_id}, {"digest": NO_ONE})
    for number, fields in enumerate(wanted, 1):
        directory.find(worker, messages.FindKey(number, **fields))
    await until(lambda: len(worker.of(messages.KeyFound)) == 3)
    assert [one.key.name if one.key else None for one in worker.of(messages.KeyFound)] == ["ann", "ann", None]


async def test_changes_are_published_to_workers(
    directory: KeyDirectory, worker: FakeWorkerSession, store: StoreFile
) -> None:
    record, _ = store.keys.create(KeyFields(name="ann", permissions=["chat"]), ANN)
    await until(lambda: worker.of(messages.KeysChanged))
    worker.sent.clear()
    store.keys.update("ann", KeyFields(enabled=False), ANN)
    await until(lambda: worker.of(messages.KeysChanged))
    assert worker.of(messages.KeysChanged)[0].ids == [record.key.key_id]


async def test_used_keys_stay_valid_without_the_database_until_grace_is_over(
    executor: StoreExecutor, keys: Keys, sessions: WorkerSessions, worker: FakeWorkerSession, store: StoreFile
) -> None:
    directory = KeyDirectory(executor, keys, sessions, 3600, poll_interval=0.02)
    record, _ = store.keys.create(KeyFields(name="ann"), ANN)
    directory.start()
    directory.find(worker, messages.FindKey(1, key_id=record.key.key_id))
    await until(lambda: worker.of(messages.KeyFound))
    store.database.close()
    for path in store.path.parent.glob("store.db*"):
        path.unlink()
    store.path.mkdir()
    await until(lambda: not directory.is_store_up)
    worker.sent.clear()
    directory.find(worker, messages.FindKey(2, key_id=record.key.key_id))
    directory.find(worker, messages.FindKey(3, key_id="another"))
    await until(lambda: len(worker.sent) == 2)
    assert [(type(one), one.request) for one in worker.sent] == [(messages.KeyFound, 2), (messages.Refused, 3)]
    assert worker.sent[1].code == "store_unavailable"
    directory.configure(0.0)
    await until(lambda: worker.of(messages.KeysChanged))
    directory.find(worker, messages.FindKey(4, key_id=record.key.key_id))
    await until(lambda: len(worker.of(messages.Refused)) == 2)
    store.path.rmdir()
    await until(lambda: directory.is_store_up)
    directory.close()


async def test_a_fault_does_not_end_the_polling(
    directory: KeyDirectory, keys: Keys, worker: FakeWorkerSession, store: StoreFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [TypeError("a fault of ours")]
    changed_since = keys.changed_since

    def fail_once(revision: int) -> tuple[int, list[str]]:
        if faults:
            raise faults.pop()
        return changed_since(revision)

    monkeypatch.setattr(keys, "changed_since", fail_once)
    await until(lambda: not faults)
    store.keys.create(KeyFields(name="ann"), ANN)
    await until(lambda: worker.of(messages.KeysChanged))
