"""The manager with real processes under real guards. The engines are small scripts: only what they do at start, at the
end and when killed matters here.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import Engine, LaunchPlan, ModelFacts, ModelProblem, Placement
from llm_api_server.ipc.lease_messages import Granted, RevokeSlots
from llm_api_server.ipc.messages import Models, Refused, ToClient
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.process import LocalLauncher, process_start_time
from llm_api_server.manager.manager import Manager
from llm_api_server.types import EngineName, ModelState
from tests.machine import Machine
from tests.waiting import until

pytestmark = pytest.mark.anyio

SERVES = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"
FAILS = "import sys; print('OutOfMemory: 7 of 6 GiB'); sys.exit(3)"
HANGS = "import signal; signal.pause()"


class ScriptEngine:
    """An adapter whose model path is the script to run; it is ready when it has made its socket file."""

    name: EngineName = "llama_cpp"
    phase_marks: Sequence[tuple[str, str]] = ()

    def inspect(self, model: ModelConfig) -> ModelFacts:
        if model.path == "missing":
            raise ModelProblem("the file does not exist")
        return ModelFacts(context_length=128)

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        del placement
        return LaunchPlan([sys.executable, "-c", model.path, str(socket)], f"unix:{socket}", {"MODEL": name})

    async def wait_ready(self, plan: LaunchPlan) -> None:
        while not Path(plan.address.removeprefix("unix:")).exists():
            await asyncio.sleep(0.01)

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        return f"{log_tail.strip()} (exit code {exit_code})"


class Recorder:
    """A client that keeps what it is sent."""

    def __init__(self) -> None:
        self.is_worker = False
        self.pid = 0
        self.grants: dict[str, int] = {}
        self.running: dict[str, list[str]] = {}
        self.reading: dict[int, tuple[str, int]] = {}
        self.in_flight: dict[str, int] = {}
        self.blocked: dict[str, int] = {}
        self.messages: asyncio.Queue[ToClient] = asyncio.Queue()
        self.told: list[list[ModelState]] = []

    def send(self, message: ToClient) -> None:
        if isinstance(message, Models) and not message.request:
            self.told.append([status.state for status in message.models])
        else:
            self.messages.put_nowait(message)

    async def next(self) -> Any:
        async with asyncio.timeout(30):
            return await self.messages.get()


class World:
    """A manager and what it needs, on a run directory that outlives it."""

    engine: Engine = ScriptEngine()

    def __init__(self, folder: Path, **models: Any) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.engines.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.options = models
        self.inventory = Machine()

    @asynccontextmanager
    async def manager(self, **scripts: str) -> AsyncIterator[Manager]:
        available = {name: {"path": script} for name, script in scripts.items()}
        config = Config.model_validate({"models": {"available": available, "min_loaded_time": 0, **self.options}})
        engine = self.engine
        engines = {name: (engine, entry) for name, entry in config.models.available.items()}
        with self.run_dir.lock.open("a+b") as lock:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhllixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            launcher = LocalLauncher(self.run_dir)
            manager = Manager(config, engines, launcher, self.run_dir, self.folder / "logs", self.inventory)
            await manager.start()
            try:
                yield manager
            finally:
                await manager.close()

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.engines.iterdir())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def connect(manager: Manager) -> Recorder:
    client = Recorder()
    manager.connected(client)
    return client


def state(manager: Manager, name: str) -> ModelState:
    return next(status for status in manager.board.statuses() if status.id == name).state


def pid_of(manager: Manager, name: str) -> int:
    pid = next(status for status in manager.board.statuses() if status.id == name).pid
    assert pid is not None
    return pid


async def granted(manager: Manager, client: Recorder, model: str, request: int = 1) -> Granted:
    manager.acquire(client, request, model)
    message = await client.next()
    assert isinstance(message, Granted), message
    assert message.request == request
    return message


async def test_a_request_loads_its_model_and_nothing_is_left_after_close(world: World) -> None:
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


async def test_workers_hear_of_states_and_nothing_of_every_request(world: World) -> None:
    """All models are in each word to them: it must not grow with the traffic."""
    async with world.manager(a=SERVES, b=SERVES) as manager:
        client = connect(manager)
        manager.hello(client, {})
        grant = await granted(manager, client, "a")
        states = [ModelState.STOPPED, ModelState.STARTING, ModelState.READY]
        assert list(dict.fromkeys(one for one, _ in client.told)) == states
        heard = len(client.told)
        for number in range(2, 5):
            manager.report(client, {grant.instance.id: 1}, {})
            manager.release(client, grant.instance.id, grant.slots)
            manager.report(client, {}, {})
            await granted(manager, client, "a", number)
            await asyncio.sleep(0.15)
        assert len(client.told) == heard
        manager.release(client, grant.instance.id, grant.slots)
        manager.unload(client, 9, "a", wait=True)
        await client.next()
        assert client.told[-1] == [ModelState.STOPPED, ModelState.STOPPED]


async def test_the_engines_own_reason_reaches_the_client(world: World) -> None:
    async with world.manager(a=FAILS) as manager:
        client = connect(manager)
        manager.acquire(client, 1, "a")
        refusal = await client.next()
        assert isinstance(refusal, Refused)
        assert "OutOfMemory: 7 of 6 GiB (exit code 3)" in refusal.message
        assert refusal.code == "model_load_failed"
        (status,) = manager.board.statuses()
        assert status.state is ModelState.FAILED
        assert status.error == "OutOfMemory: 7 of 6 GiB (exit code 3)"


async def test_a_missing_file_is_known_before_any_request(world: World) -> None:
    async with world.manager(a="missing") as manager:
        await until(lambda: state(manager, "a") is ModelState.FAILED)
        client = connect(manager)
        manager.acquire(client, 1, "a")
        assert "the file does not exist" in (await client.next()).message


async def test_a_model_that_cannot_load_pushes_nobody_out(world: World) -> None:
    async with world.manager(a=SERVES, b="missing") as manager:
        client = connect(manager)
        grant = await granted(manager, client, "a")
        manager.release(client, grant.instance.id, grant.slots)
        manager.acquire(client, 2, "b")
        refusal = await client.next()
        assert (refusal.request, refusal.code) == (2, "model_load_failed")
        assert state(manager, "a") is ModelState.READY


async def test_unloading_what_cannot_load_is_done_at_once(world: World) -> None:
    async with world.manager(a="missing") as manager:
        client = connect(manager)
        manager.unload(client, 1, "a", wait=True)
        assert isinstance(await client.next(), Models)


async def test_a_load_that_hangs_is_ended_at_its_timeout(tmp_path: Path) -> None:
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
        await asyncio.sleep(0.05)
        assert state(manager, "a") is ModelState.READY
        manager.release(first, grant.instance.id, grant.slots)
        message = await second.next()
        assert message.instance.model == "b"
        assert state(manager, "a") is ModelState.STOPPED


async def test_workers_are_told_to_drain_a_busy_model(tmp_path: Path) -> None:
    async with World(tmp_path, max_wait_time=0.1).manager(a=SERVES, b=SERVES) as manager:
        worker, other = connect(manager), connect(manager)
        manager.hello(worker, {})
        grant = await granted(manager, worker, "a")
        manager.acquire(other, 1, "b")
        assert await worker.next() == RevokeSlots(grant.instance.id)
        manager.release(worker, grant.instance.id, grant.slots)
        assert (await other.next()).instance.model == "b"


async def test_a_vanished_worker_holds_nothing(world: World) -> None:
    async with world.manager(a=SERVES, b=SERVES) as manager:
        worker, other = connect(manager), connect(manager)
        await granted(manager, worker, "a")
        manager.acquire(worker, 2, "b")
        manager.disconnected(worker)
        assert (await granted(manager, other, "b")).instance.model == "b"
        assert worker.messages.empty()


async def test_a_killed_engine_is_started_anew(world: World) -> None:
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
        # The load command hears of the end as well: nobody waits for a load that will not come.
        assert isinstance(await client.next(), Models)
        assert process_start_time(pid) is None


async def test_unload_before_a_load_has_begun_frees_the_place(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        # Both in one step of the loop: the task of the instance exists and has not run yet.
        manager._carry_out(manager._scheduler.load(0, "a", asyncio.get_running_loop().time()))
        manager.unload(client, 2, "a", wait=True)
        assert isinstance(await client.next(), Models)
        assert (await granted(manager, client, "a", 3)).instance.model == "a"


async def test_the_next_manager_adopts_what_serves(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        grant = await granted(manager, client, "a")
        pid = pid_of(manager, "a")
        await abandon(manager)
    async with world.manager(a=SERVES) as successor:
        assert state(successor, "a") is ModelState.READY
        assert pid_of(successor, "a") == pid
        again = connect(successor)
        successor.hello(again, {grant.instance.id: 3})
        assert successor.board.statuses()[0].in_flight == 3
        assert (await granted(successor, again, "a")).instance.id == grant.instance.id
    assert process_start_time(pid) is None


async def test_a_worker_that_comes_back_late_hears_that_its_instance_drains(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        early, late = connect(manager), connect(manager)
        instance = (await granted(manager, early, "a")).instance.id
        manager.unload(early, 2, "a", wait=True)
        assert await early.next() == RevokeSlots(instance)
        manager.hello(late, {instance: 1})
        assert await late.next() == RevokeSlots(instance)


async def test_an_engine_of_a_changed_entry_is_ended_not_adopted(world: World) -> None:
    async with world.manager(a=SERVES) as manager:
        await granted(manager, connect(manager), "a")
        pid = pid_of(manager, "a")
        await abandon(manager)
    async with world.manager(a=SERVES + " # changed") as successor:
        assert state(successor, "a") is ModelState.STOPPED
        assert process_start_time(pid) is None
    assert world.leftovers() == []


async def abandon(manager: Manager) -> None:
    """As if it had been killed: its tasks end, its engines do not."""
    for running in list(manager._running.values()):
        assert running.task is not None
        running.task.cancel()
        await asyncio.wait({running.task})
    manager._running.clear()
    manager._scheduler._bookings.clear()
