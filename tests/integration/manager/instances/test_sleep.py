"""A manager that puts engines to sleep and wakes them: real processes and sockets, a stand-in for vLLM's endpoints."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import LaunchPlan, ModelFacts, Need, Placement, SleepFootprint
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from llm_api_server.ipc.lease_messages import Granted, Queued
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.device_watch import RELEASE_TIMEOUT
from llm_api_server.manager.instances.process import LocalLauncher, process_start_time
from llm_api_server.manager.manager import Manager
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.load_telemetry import LoadTelemetry
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.worker_session import WorkerSessions
from llm_api_server.types import EngineName, ModelState
from tests.machine import GIB, Machine, gpus, ram
from tests.script_engine import Recorder, ScriptEngine
from tests.waiting import until

pytestmark = pytest.mark.anyio

_STAND_IN = Path(__file__).parents[3] / "sleepy_engine.py"


class SleepyEngine(ScriptEngine):
    """An engine with sleep mode. The model's path is the fault of the engine, or `none`."""

    name: EngineName = "vllm"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def inspect(self, model: ModelConfig) -> ModelFacts:
        del model
        need = Need("gpu", 5 * GIB, share=20 / 24, measures_memory=True)
        return ModelFacts(need=need, sleep_footprint=SleepFootprint(int(1.5 * GIB), 8 * GIB))

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        assert placement is not None
        assert [one.device for one in placement.devices] == ["gpu0"]
        fault = [] if model.path == "none" else [model.path]
        files = [str(self.folder / f"{name}.memory"), str(self.folder / f"{name}.calls")]
        return LaunchPlan([sys.executable, str(_STAND_IN), str(socket), *files, *fault], f"unix:{socket}")


class SleepyMachine(Machine):
    """One GPU. Its used memory is what live stand-ins state; that of an ended one is free after `lag` more polls."""

    def __init__(self, folder: Path) -> None:
        super().__init__(*gpus(24), ram(64))
        self.folder = folder
        self.lag = 0

    def used(self) -> Mapping[str, int]:
        total = 0.0
        for file in self.folder.glob("*.memory"):
            size, pid = file.read_text().split()
            if process_start_time(int(pid)) is None:
                self.lag -= 1
                if self.lag < 0:
                    file.unlink()
                    continue
            total += float(size)
        return {"gpu0": int(total * GIB), "ram": 0}


class World:
    def __init__(self, folder: Path, **faults: str) -> None:
        self.folder = folder
        self.machine = SleepyMachine(folder)
        self.faults = faults
        self.client = Recorder()
        self.manager: Manager
        self.release_timeout = RELEASE_TIMEOUT

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[World]:
        available = {name: {"path": fault, "sleep": True} for name, fault in self.faults.items()}
        models = {"available": available, "min_loaded_time": 0, "max_loaded": 3, "sleep_timeout": 0.2, **options}
        config = Config.model_validate({"models": models})
        engine = SleepyEngine(self.folder)
        run_dir = RunDir(self.folder / "run")
        run_dir.engines.mkdir(parents=True, exist_ok=True)
        engines = {name: (engine, entry) for name, entry in config.models.available.items()}
        with run_dir.lock.open("a+b") as lock:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhllixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            self.is_abandoned = False
            self.manager = Manager(
                config,
                engines,
                launcher=LocalLauncher(run_dir),
                run_dir=run_dir,
                log_dir=self.folder / "logs",
                inventory=self.machine,
                telemetry=LoadTelemetry(Counters(), Tracing()),
                sessions=WorkerSessions(),
                release_timeout=self.release_timeout,
            )
            await self.manager.start()
            self.manager.connect(self.client)
            try:
                yield self
            finally:
                if not self.is_abandoned:
                    await self.manager.close()

    async def abandon(self) -> None:
        """End the manager and leave its engines, as if it had been killed."""
        await self.manager.leave()
        self.is_abandoned = True

    def status(self, name: str) -> ModelStatus:
        return next(status for status in self.manager.statuses() if status.id == name)

    def calls(self, name: str) -> list[str]:
        file = self.folder / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []

    async def use(self, name: str) -> str:
        """Send one request; return the instance that served it."""
        self.manager.acquire(self.client, 1, name)
        while isinstance(granted := await self.client.next(), Queued):
            pass  # a slow machine may take more than a second
        assert isinstance(granted, Granted), granted
        self.manager.return_slots(self.client, granted.instance.id, granted.slots)
        return granted.instance.id

    async def wait_state(self, name: str, state: ModelState) -> None:
        await until(lambda: self.status(name).state is state)


async def test_idle_model_sleeps_and_the_next_request_wakes_it(tmp_path: Path) -> None:
    async with World(tmp_path, a="none").running(deep_sleep_timeout=0) as world:
        first = await world.use("a")
        await world.wait_state("a", ModelState.SLEEPING)
        await until(lambda: world.status("a").devices == {"gpu0": int(1.5 * GIB), "ram": 8 * GIB})
        assert await world.use("a") == first
        assert world.calls("a")[:2] == ["/sleep?level=1", "/wake_up"]


async def test_long_sleep_becomes_deep_and_waking_reloads_the_weights(tmp_path: Path) -> None:
    async with World(tmp_path, a="none").running(deep_sleep_timeout=0.5) as world:
        first = await world.use("a")
        await until(lambda: "/sleep?level=2" in world.calls("a"))
        assert await world.use("a") == first
        assert world.calls("a")[:6] == [
            "/sleep?level=1",
            "/wake_up",
            "/sleep?level=2",
            "/wake_up?tags=weights",
            "/collective_rpc reload_weights",
            "/wake_up?tags=kv_cache",
        ]


async def test_two_models_swap_by_sleep_and_keep_their_processes(tmp_path: Path) -> None:
    async with World(tmp_path, a="none", b="none").running(sleep_timeout=0) as world:
        instances = [await world.use(name) for name in "ababab"]
        assert instances[:2] * 3 == instances
        assert world.status("a").state is ModelState.SLEEPING
        assert world.status("b").state is ModelState.READY


@pytest.mark.parametrize("fault", ["keeps_memory", "refuses_sleep"])
async def test_engine_that_frees_no_memory_is_unloaded(tmp_path: Path, fault: str) -> None:
    world = World(tmp_path, a=fault, b="none")
    world.release_timeout = 0.5
    async with world.running(sleep_timeout=0):
        await world.use("a")
        await world.use("b")
        assert world.status("a").state is ModelState.STOPPED
        assert world.status("b").devices == {"gpu0": int(20 / 24 * 24 * GIB)}


async def test_engine_that_does_not_wake_is_replaced(tmp_path: Path) -> None:
    async with World(tmp_path, a="refuses_wake").running() as world:
        first = await world.use("a")
        await world.wait_state("a", ModelState.SLEEPING)
        assert await world.use("a") != first


async def test_next_start_waits_until_the_memory_is_free(tmp_path: Path) -> None:
    async with World(tmp_path, a="none", b="none").running(sleep_timeout=0) as world:
        await world.use("a")
        world.machine.lag = 20
        world.manager.unload(world.client, 2, "a", wait=True)
        await world.client.next()
        assert world.machine.lag <= 0, "the driver was asked until the memory was free"
        await world.use("b")


async def test_sleeping_engines_of_a_killed_manager_are_not_adopted(tmp_path: Path) -> None:
    world = World(tmp_path, a="none")
    async with world.running(deep_sleep_timeout=0) as one:
        first = await one.use("a")
        await one.wait_state("a", ModelState.SLEEPING)
        pid = one.status("a").pid
        await one.abandon()
    async with world.running(deep_sleep_timeout=0) as other:
        assert other.status("a").state is ModelState.STOPPED
        assert pid is not None
        assert process_start_time(pid) is None
        assert await other.use("a") != first


def test_vllm_models_on_a_cpu_do_not_sleep() -> None:
    engine = VllmEngine(EngineSettings(), Host(8 * GIB, 2, has_nvidia=False))
    assert engine.inspect(ModelConfig(path="org/model", sleep=True)).sleep_footprint is None
