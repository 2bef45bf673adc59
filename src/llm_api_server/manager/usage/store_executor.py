"""The database, for a process that must never wait for it: one thread reads and one writes, each in order."""

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


#: How far behind others the thread that writes may fall where all want the processor: nobody waits for it.
_NICENESS = 10


class StoreExecutor:
    """Opens the database before the first use, and again after it could not be opened."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._is_closed = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write", initializer=_give_way)

    async def read(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Answers come in the order of the questions. Raises `StoreError`."""
        return await self._run(self._reader, lambda: work(*args, **kwargs))

    async def write(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Also for what must see all that was written before. Raises `StoreError`."""
        return await self._run(self._writer, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Forget what has not begun; what has begun may take its time, and nobody waits for it."""
        self._is_closed = True
        for executor in (self._reader, self._writer):
            executor.shutdown(wait=False, cancel_futures=True)
        self._database.close()

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        def opened() -> Result:
            self._database.open()
            return work()

        if self._is_closed:
            raise StoreError("The server is ending.")
        return await asyncio.get_running_loop().run_in_executor(executor, opened)


def _give_way() -> None:
    """On Linux niceness is a thread's own, so engines that this process starts later do not inherit it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
