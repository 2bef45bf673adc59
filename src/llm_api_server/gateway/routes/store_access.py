"""A worker's access to the database, in threads. The first call opens it.

SQLAlchemy is imported only then: most workers never need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
from loguru import logger

from llm_api_server.admin.keys import ManagedKeys
from llm_api_server.config.models import AuthConfig
from llm_api_server.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from llm_api_server.store.database import Database
    from llm_api_server.store.keys import Keys
    from llm_api_server.store.usage import UsageLedger

T = TypeVar("T")

#: Pattern of texts that PostgreSQL accepts.
NO_NUL = r"^[^\x00]*$"
#: Largest integer of a query parameter.
MAX_INTEGER = 2**53
#: Threads of one worker that may wait for the database at the same time.
_MAX_THREADS = 4
_RETRY_AFTER = 5.0
_UNAVAILABLE = "The database of keys and usage is unavailable; the server's log has the reason. Try again."


@dataclass(frozen=True)
class Stored:
    """Contents of the database. `managed` adds the keys of the configuration."""

    database: Database
    managed: ManagedKeys
    keys: Keys
    usage: UsageLedger


class StoreAccess:
    """The database as routes use it. `source` is the configuration file, for messages."""

    def __init__(self, storage_url: str, auth: AuthConfig, source: Path) -> None:
        self._storage_url = storage_url
        self._auth = auth
        self._source = source
        self._lock = threading.Lock()
        self._stored: Stored | None = None
        self._limiter = anyio.CapacityLimiter(_MAX_THREADS)

    def configure(self, auth: AuthConfig) -> None:
        with self._lock:
            self._auth = auth
            if self._stored is not None:
                self._stored = replace(self._stored, managed=ManagedKeys(auth, self._source, self._stored.keys))

    async def call(self, work: Callable[[Stored], T]) -> T:
        """Run `work` in a thread and return its result. Raises `StoreUnavailable`, and the `ApiError`s of `work`."""
        try:
            return await anyio.to_thread.run_sync(lambda: work(self._opened()), limiter=self._limiter)
        except StoreError as error:
            logger.warning("{}", error)
            raise StoreUnavailable(_UNAVAILABLE, retry_after=_RETRY_AFTER) from error

    def close(self) -> None:
        if self._stored is not None:
            self._stored.database.close()

    def _opened(self) -> Stored:
        with self._lock:
            if self._stored is None:
                self._stored = self._open()
            return self._stored

    def _open(self) -> Stored:
        """Open the database without I/O: it connects with the first query."""
        from llm_api_server.store.database import Database  # noqa: PLC0415 - imports SQLAlchemy
        from llm_api_server.store.keys import Keys  # noqa: PLC0415
        from llm_api_server.store.usage import UsageLedger  # noqa: PLC0415

        database = Database(self._storage_url)
        keys = Keys(database)
        return Stored(database, ManagedKeys(self._auth, self._source, keys), keys, UsageLedger(database))
