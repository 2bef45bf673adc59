"""Keys of the database for the workers: looks them up and publishes their changes. On the manager's one loop.

While the database cannot be used, keys that were found before stay valid for `grace` seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from loguru import logger

from llm_api_server.auth.access import Key
from llm_api_server.errors import StoreError, StoreUnavailable
from llm_api_server.event_loop.background import TaskSet, run_restarting
from llm_api_server.ipc.messages import FindKey, KeyFound, KeysChanged, Refused
from llm_api_server.manager.usage.store_executor import StoreExecutor
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from llm_api_server.store.keys import Keys

#: Seconds between two polls for changed keys.
POLL_INTERVAL = 0.25
MAX_REMEMBERED_KEYS = 100_000


class KeyDirectory:
    """Replies to `FindKey`, sends `KeysChanged` to all workers, and knows whether the database can be used."""

    def __init__(
        self,
        executor: StoreExecutor,
        keys: Keys,
        sessions: WorkerSessions,
        grace: float,
        *,
        poll_interval: float = POLL_INTERVAL,
    ) -> None:
        self._executor = executor
        self._keys = keys
        self._grace = grace
        self._poll_interval = poll_interval
        self._sessions = sessions
        self._remembered: OrderedDict[str, Key] = OrderedDict()
        self._revision: int | None = None
        self._lost_since: float | None = None
        self._is_closing = False
        self._tasks = TaskSet()
        self._poller: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._poller = asyncio.create_task(run_restarting(self._poll))

    def close(self) -> None:
        self._is_closing = True
        if self._poller is not None:
            self._poller.cancel()

    def configure(self, grace: float) -> None:
        self._grace = grace

    @property
    def is_store_up(self) -> bool:
        return self._lost_since is None

    def find(self, worker: WorkerSession, message: FindKey) -> None:
        """Send `KeyFound` once the database has answered, or `Refused`."""
        self._tasks.start(self._find(worker, message))

    async def _find(self, worker: WorkerSession, message: FindKey) -> None:
        name = message.digest or f"id:{message.key_id}"
        try:
            key = await self._executor.read(self._keys.find, digest=message.digest, key_id=message.key_id)
        except StoreError as error:
            self._mark_lost(str(error))
            key = self._remembered.get(name)
            if key is None or self._is_grace_over():
                text = "Keys cannot be looked up at the moment; try again shortly."
                worker.send(Refused(message.request, StoreUnavailable.code or "", text, retry_after=5))
                return
        else:
            self._remember(name, key)
        worker.send(KeyFound(message.request, key))

    def _remember(self, name: str, key: Key | None) -> None:
        if key is None:
            self._remembered.pop(name, None)
            return
        self._remembered[name] = key
        self._remembered.move_to_end(name)
        if len(self._remembered) > MAX_REMEMBERED_KEYS:
            self._remembered.popitem(last=False)

    async def _poll(self) -> None:
        """Publish which keys have changed, and once that no cached key is valid any more when grace is over."""
        is_published = False
        while True:
            try:
                known, changed = self._revision, list[str]()
                if known is None:
                    revision = await self._executor.read(self._keys.revision)
                else:
                    revision, changed = await self._executor.read(self._keys.changed_since, known)
                self._revision = revision
            except StoreError as error:
                self._mark_lost(str(error))
                if self._is_grace_over() and not is_published:
                    is_published = True
                    self._sessions.publish(KeysChanged())
            else:
                self._mark_found()
                is_published = False
                if known is not None and revision < known:  # the database was replaced by another
                    self._sessions.publish(KeysChanged())
                elif changed:
                    self._sessions.publish(KeysChanged(changed))
            await asyncio.sleep(self._poll_interval)

    def _mark_lost(self, reason: str) -> None:
        if self._lost_since is None and not self._is_closing:
            self._lost_since = time.monotonic()
            logger.error(
                "the database cannot be used: {} Keys of the configuration stay valid; keys that were used before, "
                "for {:.0f} s more.",
                reason,
                self._grace,
            )

    def _mark_found(self) -> None:
        if self._lost_since is not None:
            logger.info("the database is back after {:.1f} s", time.monotonic() - self._lost_since)
            self._lost_since = None

    def _is_grace_over(self) -> bool:
        return self._lost_since is not None and time.monotonic() - self._lost_since > self._grace
