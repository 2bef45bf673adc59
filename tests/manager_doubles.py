"""Doubles for tests of the manager: a worker's session, and the database as another process has it open."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llm_api_server.ipc.messages import Hello
from llm_api_server.manager.worker_session import WorkerSession
from llm_api_server.store.database import Database
from llm_api_server.store.keys import Keys
from llm_api_server.store.ledger_rows import UsageQuery
from llm_api_server.store.usage import UsageLedger


class FakeWorkerSession(WorkerSession):
    """Keeps what it is sent."""

    def __init__(self, name: str = "w") -> None:
        self.sent: list[Any] = []
        super().__init__(self.sent.append)
        self.register(Hello(1, worker=name))

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class StoreFile:
    """A SQLite file, opened by another process than the manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = Database(f"sqlite:///{path}")
        self.keys = Keys(self.database)
        self.ledger = UsageLedger(self.database)

    def sums(self) -> list[Any]:
        now = time.time()
        return self.ledger.query(UsageQuery(since=now - 86400, until=now + 86400, group_by=("key",)))
