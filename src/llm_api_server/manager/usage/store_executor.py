"""Runs database calls in two threads, one that reads and one that writes, so that the manager's loop never waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from llm_api_server.errors import StoreError
from llm_api_server.store.database import Database

Given = ParamSpec("Given")
Result = TypeVar("Result")

#: Niceness of the writing thread: nothing waits for it, so it yields the processor to all others.
_NICENESS = 10


class StoreExecutor:
    """Opens the database before the first call, and again after opening it failed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._is_closed = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write", initializer=_lower_priority)

    async def read(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Return what `work` returns; calls end in the order they were made. Raises `StoreError`."""
        return await self._run(self._reader, lambda: work(*args, **kwargs))

    async def write(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Run `work` after all earlier writes, which it sees. Raises `StoreError`."""
        return await self._run(self._writer, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Cancel calls that have not begun; do not wait for those that have."""
        self._is_closed = True
        for executor in (self._reader, self._writer):
            executor.shutdown(wait=False, cancel_futures=True)
        self._database.close()

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        def opened() -> Result:
            self._database.open()
            return work()

        if self._is_closed:
            raise StoreError("The server is stopping.")
        return await asyncio.get_running_loop().run_in_executor(executor, opened)


def _lower_priority() -> None:
    """Lower this thread's priority. On Linux niceness is per thread, so engines do not inherit it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
