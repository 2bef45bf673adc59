"""A database for tests of the manager."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.worker_session import WorkerSessions
from llm_api_server.store.database import Database
from tests.manager_doubles import StoreFile


@pytest.fixture
def sessions() -> WorkerSessions:
    return WorkerSessions()


@pytest.fixture
def store(tmp_path: Path) -> StoreFile:
    one = StoreFile(tmp_path / "store.db")
    one.database.open()
    return one


@pytest.fixture
def executor(store: StoreFile) -> Iterator[StoreExecutor]:
    """The manager's threads, on the same file."""
    one = StoreExecutor(Database(f"sqlite:///{store.path}"))
    yield one
    one.close()
