"""A manager whose engines are small scripts in real processes under real guards."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import Engine, LaunchPlan, ModelFacts, ModelProblem, Placement
from llm_api_server.ipc.lease_messages import Queued
from llm_api_server.ipc.messages import Models, ToClient
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.process import LocalLauncher
from llm_api_server.manager.manager import Manager
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.load_telemetry import LoadTelemetry
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from llm_api_server.types import EngineName, ModelState
from tests.machine import Machine

SERVES = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"
FAILS = "import sys; print('OutOfMemory: 7 of 6 GiB'); sys.exit(3)"
HANGS = "import signal; signal.pause()"


class ScriptEngine:
    """An engine whose model path is the script to run; it is ready once its socket file exists."""

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


class Recorder(WorkerSession):
    """Session of a client that records the messages it gets."""

    def __init__(self) -> None:
        super().__init__(self._receive)
        self.messages: asyncio.Queue[ToClient] = asyncio.Queue()
        self.updates: list[list[ModelState]] = []

    def _receive(self, message: ToClient) -> None:
        if isinstance(message, Models) and not message.request:
            self.updates.append([status.state for status in message.models])
        elif not isinstance(message, Queued):  # sent at fixed times, while a load happens to be under way or not
            self.messages.put_nowait(message)

    async def next(self) -> Any:
        async with asyncio.timeout(30):
            return await self.messages.get()


class World:
    """Managers, one after the other, on the same run directory."""

    engine: Engine = ScriptEngine()

    def __init__(self, folder: Path, **models: Any) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.engines.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.options = models
        self.inventory = Machine()
        self._abandoned: set[Manager] = set()

    @asynccontextmanager
    async def manager(self, **scripts: str) -> AsyncIterator[Manager]:
        available = {name: {"path": script} for name, script in scripts.items()}
        config = Config.model_validate({"models": {"available": available, "min_loaded_time": 0, **self.options}})
        engine = self.engine
        engines = {name: (engine, entry) for name, entry in config.models.available.items()}
        with self.run_dir.lock.open("a+b") as lock:
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhllixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            manager = Manager(
                config,
                engines,
                launcher=LocalLauncher(self.run_dir),
                run_dir=self.run_dir,
                log_dir=self.folder / "logs",
                inventory=self.inventory,
                telemetry=LoadTelemetry(Counters(), Tracing()),
                sessions=WorkerSessions(),
            )
            await manager.start()
            try:
                yield manager
            finally:
                if manager not in self._abandoned:
                    await manager.close()

    async def abandon(self, manager: Manager) -> None:
        """End the manager and leave its engines, as if it had been killed."""
        await manager.leave()
        self._abandoned.add(manager)

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.engines.iterdir())


def connect(manager: Manager) -> Recorder:
    client = Recorder()
    manager.connect(client)
    return client


def state(manager: Manager, name: str) -> ModelState:
    return next(status for status in manager.statuses() if status.id == name).state


def pid_of(manager: Manager, name: str) -> int:
    pid = next(status for status in manager.statuses() if status.id == name).pid
    assert pid is not None
    return pid
