"""Runs a coroutine at once, up to its first wait; only one that waits becomes a task.

Python 3.12 has eager tasks for it; most requests never wait before they are with their engine, and on 3.11 a task and
its turns of the loop would be a good part of their time.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


def run(work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """None when `work` has ended already; what it raises then is raised here.

    Before its first wait `work` is in no task; what needs one waits for `in_task`.
    """
    try:
        waits_for = work.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_go_on(work, waits_for))


@types.coroutine
def _go_on(work: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of `work`, which has begun and waits."""
    while True:
        try:
            value = yield waits_for
            failure = None
        except BaseException as error:  # noqa: BLE001 - `work` decides what it means
            failure = error
        try:
            waits_for = work.send(value) if failure is None else work.throw(failure)
        except StopIteration:
            return


async def in_task() -> None:
    """From here on the caller is in a task, as `asyncio.timeout` demands."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)
