"""Background tasks survive faults and are kept until they end."""

from __future__ import annotations

import asyncio

import pytest

from llm_api_server.event_loop.background import TaskSet, run_restarting

pytestmark = pytest.mark.anyio


async def test_a_loop_that_fails_is_started_again_until_it_returns() -> None:
    failures = [ValueError("first"), KeyError("second")]
    runs: list[int] = []

    async def loop() -> None:
        runs.append(len(failures))
        if failures:
            raise failures.pop()

    await run_restarting(loop, pause=0)
    assert runs == [2, 1, 0]


async def test_a_restarting_loop_can_be_cancelled() -> None:
    task = asyncio.create_task(run_restarting(_forever))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _forever() -> None:
    await asyncio.Event().wait()


async def test_a_task_set_drops_tasks_that_have_ended() -> None:
    tasks, done = TaskSet(), asyncio.Event()

    async def work() -> None:
        done.set()

    tasks.start(work())
    assert len(tasks._tasks) == 1
    await done.wait()
    await asyncio.sleep(0)
    assert not tasks._tasks
