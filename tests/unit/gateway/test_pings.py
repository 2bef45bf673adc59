"""The comments on a waiting stream end when told to, and hide no cancellation of their request."""

from __future__ import annotations

import asyncio

import pytest

from llm_api_server.gateway.client import Pings

pytestmark = pytest.mark.anyio


async def test_a_request_that_is_cancelled_while_its_pings_end_is_cancelled() -> None:
    is_pinging, may_end = asyncio.Event(), asyncio.Event()

    async def ping() -> None:
        is_pinging.set()
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    pings = Pings(ping, delay=0, interval=1)
    await is_pinging.wait()
    request = asyncio.create_task(pings.stop())
    await asyncio.sleep(0)
    request.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_nobody_pings_after_the_end() -> None:
    count = 0

    async def ping() -> None:
        nonlocal count
        count += 1
        await asyncio.sleep(0)
        if count == 3:
            raise OSError("the client is gone")

    pings = Pings(ping, delay=0, interval=0)
    while count < 3:
        await asyncio.sleep(0)
    await pings.stop()
    assert count == 3
