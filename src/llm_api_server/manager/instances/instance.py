"""One engine process, from its plan to its end: load, sleep, wake, stop, and its adoption record."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from llm_api_server.engines import sleep
from llm_api_server.engines.base import NO_PLACEMENT, LaunchPlan, ModelFacts, ModelProblem, Placement
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.log_file import engine_log
from llm_api_server.manager.instances.adoption_records import AdoptionRecord, AdoptionRecords, since, tail
from llm_api_server.manager.instances.load_phases import LoadPhases, LoadTrace, describe
from llm_api_server.manager.instances.model_registry import ModelSpec
from llm_api_server.manager.instances.process import STOP_TIMEOUT, Launcher, NoProcess, Process

#: Seconds between two reads of the log of an engine that loads.
_PHASE_INTERVAL = 0.1


@dataclass
class InstanceContext:
    """Environment that all instances share. `load_timeout` applies to later loads."""

    launcher: Launcher
    records: AdoptionRecords
    sockets: Path
    log_dir: Path
    load_timeout: float


class Instance:
    """An instance of a model. `load` or `adopt` sets `info` and `process`; `load` sets `facts` as well."""

    def __init__(
        self,
        instance_id: str,
        model: str,
        spec: ModelSpec,
        context: InstanceContext,
        placement: Placement = NO_PLACEMENT,
        *,
        is_pinned: bool = False,
    ) -> None:
        self.id = instance_id
        self.model = model
        self.placement = placement
        self.info: InstanceInfo | None = None
        self.facts = ModelFacts()
        self.process: Process | None = None
        #: Unix seconds; None while it loads.
        self.ready_at: float | None = None
        self.load_seconds: float | None = None
        self.memory_bytes: int | None = None
        #: When its counters last changed while it had requests, in Unix seconds.
        self.progress_at: float | None = None
        self.is_stopping = False
        #: The task that runs it, which `stop` cancels if no process has started yet.
        self.task: asyncio.Task[None] | None = None
        self._spec = spec
        self._engine = spec.engine
        self._context = context
        self._is_pinned = is_pinned
        self._may_sleep = False
        self._is_loading = False
        self._kill_reason: str | None = None
        self._started_at = time.time()
        self._log = engine_log(context.log_dir, model)
        self._log_offset = _size(self._log)
        self.phases = LoadPhases(spec.engine.phase_marks, self._started_at)

    def adopt(self, record: AdoptionRecord, process: Process) -> None:
        """Take over a process that an earlier manager made ready."""
        self.info, self.process = record.info, process
        self._started_at, self.load_seconds = record.started_at, record.load_seconds
        self.ready_at = time.time()
        self.phases.seconds = dict(record.phases)

    def pin(self, *, is_pinned: bool) -> None:
        """Record the pin for the next manager."""
        self._is_pinned = is_pinned
        self._write_record()

    async def load(self) -> None:
        """Start the process and wait until it is ready. Raises `ModelProblem` with the engine's reason."""
        if self.is_stopping:
            raise ModelProblem("it was stopped before it began to load")
        self._is_loading = True
        timeout = self._context.load_timeout
        try:
            async with asyncio.timeout(timeout):
                await self._load()
        except TimeoutError:
            raise ModelProblem(f"loading took longer than models.load_timeout ({timeout:g} s)") from None

    async def sleep(self, level: int, *, from_level: int) -> None:
        """Put the engine to sleep. Raises `SleepFailed`."""
        assert self.info is not None, "load or adopt comes first"
        self._may_sleep = True
        self._write_record()
        await sleep.fall_asleep(self.info.address, level, from_level=from_level)

    async def wake(self, level: int) -> None:
        """Wake the engine. Raises `SleepFailed`."""
        assert self.info is not None, "load or adopt comes first"
        await sleep.wake_up(self.info.address, level)
        self._may_sleep = False
        self._write_record()

    def load_trace(self, error: str | None = None) -> LoadTrace:
        """Return the trace of a load that has ended."""
        ended_at = self.ready_at or time.time()
        return LoadTrace(self.id, self.model, self._started_at, ended_at, dict(self.phases.seconds), error)

    async def wait_ended(self) -> str:
        """Wait until the process has ended, and return the reason."""
        assert self.process is not None, "load or adopt comes first"
        code = await self.process.wait()
        return self._kill_reason if self._kill_reason is not None else self._failure(code)

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        self.is_stopping = True
        if self.process is not None:
            self.process.terminate()
            asyncio.get_running_loop().call_later(STOP_TIMEOUT + 5, self.process.kill)
        elif self._is_loading and self.task is not None:
            # Not before its first step: a task cancelled then never reports its end. `load` handles that case.
            self.task.cancel()

    @property
    def may_stall(self) -> bool:
        """True if it is a ready process of this host and not about to end."""
        is_ready = self.ready_at is not None and not self.is_stopping and self._kill_reason is None
        return is_ready and self.process is not None and self.process.pid != 0

    def kill(self, reason: str) -> None:
        """End a process that does not work; `wait_ended` returns `reason`."""
        self._kill_reason = reason
        if self.process is not None:
            self.process.kill()

    async def clean_up(self) -> None:
        """Wait until the process is gone, and remove its files from the run directory."""
        if self.process is not None:
            await end(self.process)
        self._context.records.remove(self.id)

    async def _load(self) -> None:
        logger.info("loading model {} with {}", self.model, self._engine.name)
        self.facts = await asyncio.to_thread(self._engine.inspect, self._spec.entry)
        socket = self._context.sockets / f"{self.id}.sock"
        plan = self._engine.plan(self._spec.served_name, self._spec.entry, socket, self.placement)
        self.info = InstanceInfo(
            id=self.id,
            model=self._spec.served_name,
            engine=self._engine.name,
            address=plan.address,
            upstream_model=plan.upstream_model,
            headers=plan.headers,
            context_length=self.facts.context_length,
            tasks=self.facts.tasks,
        )
        if plan.argv:
            self.process = await self._start(plan)
            await self._wait_ready(plan, self.process)
        else:
            self.process = NoProcess()
        self.ready_at = time.time()
        self.load_seconds = self.ready_at - self._started_at
        self.phases.on_ready(self.ready_at)
        self._write_record()
        logger.info("model {} ready after {:.1f} s ({})", self.model, self.load_seconds, describe(self.phases.seconds))

    async def _start(self, plan: LaunchPlan) -> Process:
        try:
            self.process = await self._context.launcher.start(plan, self._log)
        except OSError as error:
            raise ModelProblem(f"the engine cannot be started: {error.strerror}") from error
        self.phases.on_started(time.time())
        self._write_record()
        return self.process

    async def _wait_ready(self, plan: LaunchPlan, process: Process) -> None:
        """Wait until the engine is ready. Raises `ModelProblem` if the process ends before."""
        ready = asyncio.create_task(self._engine.wait_ready(plan))
        ended = asyncio.create_task(process.wait())
        watch = asyncio.create_task(self._watch_phases())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ModelProblem(self._failure(ended.result()))
            ready.result()
        finally:
            ready.cancel()
            ended.cancel()
            watch.cancel()

    async def _watch_phases(self) -> None:
        offset = self._log_offset
        while True:
            text, offset = since(self._log, offset)
            phase = self.phases.current
            self.phases.on_log(text, time.time())
            if self.phases.current != phase:
                logger.info("loading model {}: {}", self.model, self.phases.current.replace("_", " "))
            await asyncio.sleep(_PHASE_INTERVAL)

    def _failure(self, exit_code: int | None) -> str:
        return self._engine.explain_failure(tail(self._log, self._log_offset), exit_code)

    def _write_record(self) -> None:
        """Write the adoption record; an instance without a process of this host has none."""
        if self.process is None or self.info is None or not self.process.pid:
            return
        self._context.records.write(
            AdoptionRecord(
                pid=self.process.pid,
                start_time=self.process.start_time,
                fingerprint=self._spec.fingerprint,
                model=self.model,
                info=self.info,
                started_at=self._started_at,
                load_seconds=self.load_seconds,
                phases=self.phases.seconds,
                placement=self.placement,
                may_sleep=self._may_sleep,
                is_pinned=self._is_pinned,
            )
        )


async def end(process: Process) -> None:
    """End a process: ask first, then kill; return once it is gone."""
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT + 5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
