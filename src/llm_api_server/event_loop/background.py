"""Tasks that belong to an object rather than to a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from loguru import logger


class TaskSet:
    """Holds tasks until they end; the event loop itself keeps only weak references."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_restarting(loop: Callable[[], Coroutine[None, None, None]], pause: float = 1.0) -> None:
    """Run an endless loop; log an unexpected exception, wait `pause` seconds and start the loop again."""
    while True:
        try:
            await loop()
        except Exception:  # noqa: BLE001 - the edge of the task
            logger.exception("a fault in a background task")
            await asyncio.sleep(pause)
        else:
            return
