"""Connections to engines and slots from the manager: reused, returned, kept while the manager restarts."""

from __future__ import annotations

import asyncio

import pytest

from llm_api_server.ipc import lease_messages
from llm_api_server.ipc import messages as control
from tests.gateway_worker import Gateway
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_connections_to_the_engine_are_reused(gateway: Gateway) -> None:
    for _ in range(5):
        assert (await gateway.chat(stream=True)).status_code == 200
    assert {line.split(" ")[1] for line in gateway.engine_log()} == {"1"}


async def test_connection_that_the_engine_closed_is_replaced(gateway: Gateway) -> None:
    for _ in range(4):
        assert (await gateway.chat("close-after")).status_code == 200
    assert [line.split(" ")[1] for line in gateway.engine_log()] == ["1", "2", "3", "4"]


async def test_traffic_in_flight_takes_one_lease(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as response:
        lines = response.aiter_lines()
        await anext(lines)
        for _ in range(3):
            await gateway.chat()
        assert len(gateway.manager.received_of(lease_messages.Acquire)) == 1
        gateway.open_gate(2)
        assert "data: [DONE]" in [line async for line in lines]
    await until(lambda: bool(gateway.manager.received_of(lease_messages.ReturnSlots)))
    assert gateway.manager.received_of(lease_messages.ReturnSlots) == [lease_messages.ReturnSlots("m-1", 1000)]


async def test_nothing_starts_on_a_draining_instance(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as response:
        lines = response.aiter_lines()
        await anext(lines)
        gateway.manager.revoke_slots("m-1")
        gateway.manager.push_models()
        before = gateway.leases.models
        await until(lambda: gateway.leases.models is not before)
        await gateway.chat()
        gateway.open_gate(2)
        assert "data: [DONE]" in [line async for line in lines]
    await until(lambda: len(gateway.manager.received_of(lease_messages.ReturnSlots)) == 2)
    assert len(gateway.manager.received_of(lease_messages.Acquire)) == 2
    assert [one.slots for one in gateway.manager.received_of(lease_messages.ReturnSlots)] == [999, 1001]


async def test_streams_outlive_the_manager_and_are_reported_to_the_next_one(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:3") as response:
        lines = response.aiter_lines()
        await anext(lines)
        await gateway.manager.stop()
        await until(lambda: not gateway.leases.link.is_connected)
        assert (await gateway.client.get("/readyz")).status_code == 503
        assert (await gateway.client.get("/livez")).status_code == 200
        waiting = asyncio.create_task(gateway.chat(model="org/blind"))
        await gateway.manager.start()
        assert (await waiting).status_code == 200
        assert gateway.manager.received_of(control.Hello)[-1].in_flight == {"m-1": 1}
        gateway.open_gate(3)
        assert "data: [DONE]" in [line async for line in lines]
