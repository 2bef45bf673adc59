"""The manager with real processes under real guards: loads, swaps, unloads, kills and adoption."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from llm_api_server.ipc.lease_messages import Granted, RevokeSlots
from llm_api_server.ipc.messages import Hello, Models, Refused
from llm_api_server.manager.instances.process import process_start_time
from llm_api_server.manager.manager import Manager
from llm_api_server.types import ModelState
from tests.script_engine import FAILS, HANGS, SERVES, Recorder, World, connect, pid_of, state
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def granted(manager: Manager, client: Recorder, model: str, request: int = 1) -> Granted:
    manager.acquire(client, request, model)
    message = await client.next()
    assert isinstance(message, Granted), message
    assert message.request == request
    return message


async def test_request_loads_its_model_and_close_leaves_nothing(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        grant = await granted(manager, client, "a")
        pid = pid_of(manager, "a")
        assert grant.instance.address == f"unix:{world.run_dir.engines / grant.instance.id}.sock"
        assert process_start_time(pid) is not None
        await manager.list_models(client, 9)
        (status,) = (await client.next()).models
        assert (status.state, status.in_flight, status.context_length) == (ModelState.READY, 1, 128)
        assert status.memory_bytes > 1_000_000
    assert process_start_time(pid) is None
    assert world.leftovers() == []


async def test_workers_get_states_and_nothing_per_request(world: World) -> None:
    """Each message has all models, so that their number must not grow with the traffic."""
    async with world.manager(a=SERVES, b=SERVES) as manager:
        client = connect(manager)
        manager.register(client, Hello(1))
        grant = await granted(manager, client, "a")
        states = [ModelState.STOPPED, ModelState.STARTING, ModelState.READY]
        assert list(dict.fromkeys(one for one, _ in client.updates)) == states
        count = len(client.updates)
        for number in range(2, 5):
            manager.report_in_flight(client, {grant.instance.id: 1}, {})
            manager.return_slots(client, grant.instance.id, grant.slots)
            manager.report_in_flight(client, {}, {})
            await granted(manager, client, "a", number)
        assert len(client.updates) == count
        manager.return_slots(client, grant.instance.id, grant.slots)
        manager.unload(client, 9, "a", wait=True)
        await client.next()
        assert client.updates[-1] == [ModelState.STOPPED, ModelState.STOPPED]


async def test_reason_of_the_engine_reaches_the_client(world: World) -> None:
    async with world.manager(a=FAILS) as manager:
        client = connect(manager)
        manager.acquire(client, 1, "a")
        refusal = await client.next()
        assert isinstance(refusal, Refused)
        assert "OutOfMemory: 7 of 6 GiB (exit code 3)" in refusal.message
        assert refusal.code == "model_load_failed"
        (status,) = manager.statuses()
        assert status.state is ModelState.FAILED
        assert status.error == "OutOfMemory: 7 of 6 GiB (exit code 3)"


async def test_missing_file_is_found_before_any_request(world: World) -> None:
    async with world.manager(a="missing") as manager:
        await until(lambda: state(manager, "a") is ModelState.FAILED)
        client = connect(manager)
        manager.acquire(client, 1, "a")
        assert "the file does not exist" in (await client.next()).message


async def test_model_that_cannot_load_evicts_nothing(world: World) -> None:
    async with world.manager(a=SERVES, b="missing") as manager:
        client = connect(manager)
        grant = await granted(manager, client, "a")
        manager.return_slots(client, grant.instance.id, grant.slots)
        manager.acquire(client, 2, "b")
        refusal = await client.next()
        assert (refusal.request, refusal.code) == (2, "model_load_failed")
        assert state(manager, "a") is ModelState.READY


async def test_unload_of_a_model_that_cannot_load_completes_at_once(world: World) -> None:
    async with world.manager(a="missing") as manager:
        client = connect(manager)
        manager.unload(client, 1, "a", wait=True)
        assert isinstance(await client.next(), Models)


async def test_hanging_load_ends_at_its_timeout(tmp_path: Path) -> None:
    async with World(tmp_path, load_timeout=0.3).manager(a=HANGS) as manager:
        client = connect(manager)
        manager.acquire(client, 1, "a")
        assert "models.load_timeout" in (await client.next()).message
    assert World(tmp_path).leftovers() == []


async def test_swap_waits_for_the_lease(world: World) -> None:
    async with world.manager(a=SERVES, b=SERVES) as manager:
        first, second = connect(manager), connect(manager)
        grant = await granted(manager, first, "a")
        manager.acquire(second, 1, "b")
        await until(lambda: bool(manager._scheduler.models["b"].queue))
        assert state(manager, "a") is ModelState.READY
        manager.return_slots(first, grant.instance.id, grant.slots)
        message = await second.next()
        assert message.instance.model == "b"
        assert state(manager, "a") is ModelState.STOPPED


async def test_slots_of_a_busy_model_are_revoked_for_a_swap(tmp_path: Path) -> None:
    async with World(tmp_path, max_wait_time=0.1).manager(a=SERVES, b=SERVES) as manager:
        worker, other = connect(manager), connect(manager)
        manager.register(worker, Hello(1))
        grant = await granted(manager, worker, "a")
        manager.acquire(other, 1, "b")
        assert await worker.next() == RevokeSlots(grant.instance.id)
        manager.return_slots(worker, grant.instance.id, grant.slots)
        assert (await other.next()).instance.model == "b"


async def test_disconnected_worker_holds_nothing(world: World) -> None:
    async with world.manager(a=SERVES, b=SERVES) as manager:
        worker, other = connect(manager), connect(manager)
        await granted(manager, worker, "a")
        manager.acquire(worker, 2, "b")
        manager.disconnect(worker)
        assert (await granted(manager, other, "b")).instance.model == "b"
        assert worker.messages.empty()


async def test_killed_engine_is_replaced(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        first = await granted(manager, client, "a")
        os.kill(pid_of(manager, "a"), signal.SIGKILL)
        await until(lambda: state(manager, "a") is ModelState.FAILED)
        second = await granted(manager, client, "a", 2)
        assert second.instance.id != first.instance.id


async def test_unload_during_a_load_ends_the_process(world: World) -> None:
    async with world.manager(a=HANGS) as manager:
        client = connect(manager)
        manager.load(client, 1, "a", wait=False)
        await client.next()
        await until(lambda: world.leftovers() != [])
        pid = pid_of(manager, "a")
        manager.unload(client, 2, "a", wait=True)
        # The load command gets a response as well.
        assert isinstance(await client.next(), Models)
        assert process_start_time(pid) is None


async def test_unload_before_a_load_has_begun_frees_the_slot(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        # Both in one step of the loop: the task of the instance exists and has not run yet.
        manager._carry_out(manager._scheduler.load(0, "a", asyncio.get_running_loop().time()))
        manager.unload(client, 2, "a", wait=True)
        assert isinstance(await client.next(), Models)
        assert (await granted(manager, client, "a", 3)).instance.model == "a"


async def test_next_manager_adopts_ready_engines(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        grant = await granted(manager, client, "a")
        pid = pid_of(manager, "a")
        await world.abandon(manager)
    async with world.manager(a=SERVES) as successor:
        assert state(successor, "a") is ModelState.READY
        assert pid_of(successor, "a") == pid
        again = connect(successor)
        successor.register(again, Hello(1, {grant.instance.id: 3}))
        assert successor.statuses()[0].in_flight == 3
        assert (await granted(successor, again, "a")).instance.id == grant.instance.id
    assert process_start_time(pid) is None


async def test_slots_of_a_draining_instance_are_revoked_when_a_worker_reconnects(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        early, late = connect(manager), connect(manager)
        instance = (await granted(manager, early, "a")).instance.id
        manager.unload(early, 2, "a", wait=True)
        assert await early.next() == RevokeSlots(instance)
        manager.register(late, Hello(1, {instance: 1}))
        assert await late.next() == RevokeSlots(instance)


async def test_engine_of_a_changed_entry_is_ended_not_adopted(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        await granted(manager, connect(manager), "a")
        pid = pid_of(manager, "a")
        await world.abandon(manager)
    async with world.manager(a=SERVES + " # changed") as successor:
        assert state(successor, "a") is ModelState.STOPPED
        assert process_start_time(pid) is None
    assert world.leftovers() == []
