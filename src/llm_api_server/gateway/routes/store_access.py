"""The database, for the few routes of a worker that read or change what is in it: in a thread, opened by the first.

SQLAlchemy is imported then: most workers never need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from llm_api_server.admin.keys import ManagedKeys
    from llm_api_server.store.database import Database
    from llm_api_server.store.keys import Keys
    from llm_api_server.store.usage import UsageLedger

T = TypeVar("T")

#: Pattern of texts that PostgreSQL accepts in a query.
NO_NUL = r"^[^\x00]*$"
#: Threads of one worker that may wait for the database at the same time.
_MAX_THREADS = 4
#: Largest integer of a query.
MAX_INTEGER = 2**53
_RETRY_AFTER = 5.0
_UNAVAILABLE = "The store of keys and usage cannot be used now; the server's log says why. Try again."


@dataclass(frozen=True)
class Stored:
    """What is in the database. `managed` knows the configuration's keys as well."""

    database: Database
    managed: ManagedKeys
    keys: Keys
    usage: UsageLedger


class StoreAccess:
    """Of one worker."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._stored: Stored | None = None
        self._limiter = anyio.CapacityLimiter(_MAX_THREADS)

    def configure(self, config: Config) -> None:
        with self._lock:
            self._config = config
            if self._stored is not None:
                self._stored = replace(self._stored, managed=_managed(config, self._stored.keys))

    async def call(self, work: Callable[[Stored], T]) -> T:
        """What `work` returns; it runs in a thread. Its errors become those that a client is answered with."""
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
                self._stored = _open(self._config)
            return self._stored


def _open(config: Config) -> Stored:
    # No I/O yet: the database connects when it is asked.
    from llm_api_server.store.database import Database  # noqa: PLC0415
    from llm_api_server.store.keys import Keys  # noqa: PLC0415
    from llm_api_server.store.usage import UsageLedger  # noqa: PLC0415

    database = Database(config.storage_url)
    keys = Keys(database)
    return Stored(database, _managed(config, keys), keys, UsageLedger(database))


def _managed(config: Config, keys: Keys) -> ManagedKeys:
    from llm_api_server.admin.keys import ManagedKeys  # noqa: PLC0415

    return ManagedKeys(config, keys)
