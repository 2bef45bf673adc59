"""Clients that disconnect or do not read: the engine stops and the slot is returned."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llm_api_server.config.models import ServerConfig
from llm_api_server.ipc import lease_messages
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import Gateway, both_ways, make_config, run_gateway
from tests.waiting import until

pytestmark = pytest.mark.anyio


@both_ways
async def test_client_that_leaves_a_stream_stops_the_engine(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:100") as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                break
    await until(lambda: "aborted" in gateway.engine_log())
    await until(lambda: bool(gateway.manager.received_of(lease_messages.ReturnSlots)))


@both_ways
async def test_client_that_leaves_before_a_json_response_stops_the_engine(gateway: Gateway) -> None:
    waiting = asyncio.create_task(gateway.chat("silent"))
    await until(lambda: len(gateway.engine_log()) == 1)
    waiting.cancel()
    await until(lambda: "aborted" in gateway.engine_log())
    await until(lambda: bool(gateway.manager.received_of(lease_messages.ReturnSlots)))


@both_ways
async def test_client_that_leaves_the_queue_is_cancelled_there(gateway: Gateway) -> None:
    gateway.manager.hold = True
    waiting = asyncio.create_task(gateway.chat())
    await until(lambda: bool(gateway.manager.received_of(lease_messages.Acquire)))
    waiting.cancel()
    await until(lambda: bool(gateway.manager.received_of(lease_messages.Cancel)))
    assert gateway.engine_log() == []


@both_ways
async def test_slow_client_slows_the_engine_down(gateway: Gateway) -> None:
    """The engine offers 64 MiB; while the client does not read, only the buffers on the way may fill."""
    sent = Path(f"{gateway.engine_socket}.sent")
    count = 4096
    async with gateway.stream(f"flood:{count}") as response:
        lines = response.aiter_lines()
        await anext(lines)
        await until(sent.exists)
        before = -1
        while (now := int(sent.read_text() or 0)) != before or not now:
            before = now
            await asyncio.sleep(0.3)
        assert 0 < now < count / 2
        received = 0
        async for line in lines:
            received += line.startswith("data: {")
    assert received > count - 3


async def test_client_that_does_not_read_is_aborted_at_the_timeout(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.5))
    async with run_gateway(run_dir, engine_socket, config) as gateway, gateway.stream("flood:4096") as response:
        assert response.status_code == 200
        await until(lambda: "aborted" in gateway.engine_log())
        await until(lambda: bool(gateway.manager.received_of(lease_messages.ReturnSlots)))
