"""Runs a coroutine at once, up to its first wait; only one that waits becomes a task.

Python 3.12 has eager tasks for it; most requests never wait before they are with their engine, and on 3.11 a task and
its turns of the loop would be a good part of their time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


def run(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """None when `work` has ended already; what it raises then is raised here.

    Before its first wait `work` is in no task; what needs one waits for `ensure_task`.
    """
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_Begun(work, waits_for))


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine that has run up to its first wait, for a task to take it up there.

    No generator: a task that is cancelled before its first step would never begin it, and `work` would not hear of it.
    """

    def __init__(self, work: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._work = work
        self._first = [waits_for]

    def send(self, value: Any) -> Any:
        return self._first.pop() if self._first else self._work.send(value)

    def throw(self, *error: Any) -> Any:
        self._first.clear()
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError("for tasks only")


async def ensure_task() -> None:
    """From here on the caller is in a task, as `asyncio.timeout` demands."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)
