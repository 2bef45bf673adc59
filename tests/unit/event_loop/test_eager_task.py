"""A coroutine that starts outside of a task continues in one as if it had always been there."""

from __future__ import annotations

import asyncio

import pytest

from llm_api_server.event_loop import eager_task

pytestmark = pytest.mark.anyio


async def run_outside(work: list[str], *, fails: bool = False) -> asyncio.Task[None] | None:
    """Run it as a protocol would: in a callback of the loop, in no task."""
    found: asyncio.Future[asyncio.Task[None] | None] = asyncio.get_running_loop().create_future()

    async def waits() -> None:
        work.append("begun")
        assert asyncio.current_task() is None
        await eager_task.ensure_task()
        assert asyncio.current_task() is not None
        async with asyncio.timeout(10):
            await asyncio.sleep(0.01)
        if fails:
            raise ValueError("as it should")
        work.append("ended")

    def call() -> None:
        task = eager_task.run(waits())
        work.append("returned")
        found.set_result(task)

    asyncio.get_running_loop().call_soon(call)
    return await found


async def test_a_coroutine_that_does_not_suspend_ends_at_once() -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    assert eager_task.run(work()) is None
    assert done == [1]


async def test_a_coroutine_that_suspends_becomes_a_task() -> None:
    work: list[str] = []
    task = await run_outside(work)
    assert work == ["begun", "returned"]
    assert task is not None
    await task
    assert work == ["begun", "returned", "ended"]


async def test_the_task_raises_failures_and_can_be_cancelled() -> None:
    task = await run_outside([], fails=True)
    assert task is not None
    with pytest.raises(ValueError, match="as it should"):
        await task
    work: list[str] = []
    task = await run_outside(work)
    assert task is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "ended" not in work


async def test_a_cancelled_coroutine_may_clean_up() -> None:
    ended: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("in order")

    task = eager_task.run(stubborn())
    assert task is not None
    task.cancel()
    await task
    assert ended == ["in order"]


async def test_a_failure_before_the_first_suspension_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        eager_task.run(fails())
