"""One engine process from its plan to its end: load, watch, stop, record. Used by the manager, on its one task each."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines import sleep
from llm_api_server.engines.base import NO_PLACEMENT, Engine, LaunchPlan, ModelFacts, ModelProblem, Placement
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.log_file import engine_log
from llm_api_server.manager.instances.adoption_records import AdoptionRecord, AdoptionRecords, since, tail
from llm_api_server.manager.instances.load_phases import LoadPhases, LoadTrace, describe
from llm_api_server.manager.instances.process import STOP_TIMEOUT, Launcher, NoProcess, Process

#: Seconds between two looks at the log of an engine that loads.
_PHASE_INTERVAL = 0.1


@dataclass
class InstanceContext:
    """What all instances of a manager share. `load_timeout` is that of later loads."""

    launcher: Launcher
    records: AdoptionRecords
    sockets: Path
    log_dir: Path
    load_timeout: float

    def log_of(self, model: str) -> Path:
        return engine_log(self.log_dir, model)


@dataclass(frozen=True)
class Spec:
    """What an instance is made from. `served_name` is the model's name to clients."""

    engine: Engine
    entry: ModelConfig
    served_name: str
    fingerprint: str


class Instance:
    """`info` and `facts` are set by `load`, `process` too; an adopted instance has all but `facts` from the start."""

    def __init__(
        self, instance_id: str, model: str, spec: Spec, around: InstanceContext, placement: Placement = NO_PLACEMENT
    ) -> None:
        self.id = instance_id
        self.model = model
        self.info: InstanceInfo | None = None
        self.facts = ModelFacts()
        self.process: Process | None = None
        self.ready_at: float | None = None
        self.load_seconds: float | None = None
        self.memory_bytes: int | None = None
        #: When its counters were last seen to move, in Unix seconds.
        self.progress_at: float | None = None
        self.is_stopping = False
        self._verdict: str | None = None
        self._is_loading = False
        self.task: asyncio.Task[None] | None = None
        self.placement = placement
        #: Its record tells the next manager.
        self.is_pinned = False
        self._may_sleep = False
        self._spec = spec
        self._engine = spec.engine
        self._around = around
        self._started_at = time.time()
        self._log = around.log_of(model)
        self._log_offset = _size(self._log)
        self.phases = LoadPhases(spec.engine.phase_marks, self._started_at)

    def adopt(self, record: AdoptionRecord, process: Process) -> None:
        """Take over a process that an earlier manager got ready."""
        self.info, self.process, self.placement = record.info, process, record.placement
        self._started_at, self.load_seconds = record.started_at, record.load_seconds
        self.ready_at = time.time()
        self.phases.seconds = dict(record.phases)
        self.is_pinned = record.is_pinned

    def pin(self, *, is_pinned: bool) -> None:
        self.is_pinned = is_pinned
        self._write_record()

    async def load(self) -> None:
        """Start the process and wait until it is ready. Raises `ModelProblem` with the engine's reason."""
        if self.is_stopping:
            raise ModelProblem("it was stopped before it began to load")
        self._is_loading = True
        timeout = self._around.load_timeout
        try:
            async with asyncio.timeout(timeout):
                await self._load()
        except TimeoutError:
            raise ModelProblem(f"loading took longer than models.load_timeout ({timeout:g} s)") from None

    async def sleep(self, level: int, *, from_level: int) -> None:
        """Raises `SleepFailed`."""
        assert self.info is not None, "load or adopt comes first"
        self._may_sleep = True
        self._write_record()
        await sleep.fall_asleep(self.info.address, level, from_level=from_level)

    async def wake(self, level: int) -> None:
        """Raises `SleepFailed`."""
        assert self.info is not None, "load or adopt comes first"
        await sleep.wake_up(self.info.address, level)
        self._may_sleep = False
        self._write_record()

    def load_trace(self, error: str | None = None) -> LoadTrace:
        """How its load went, once that is over."""
        ended_at = self.ready_at or time.time()
        return LoadTrace(self.id, self.model, self._started_at, ended_at, dict(self.phases.seconds), error)

    async def ended(self) -> str:
        """Wait until the process has ended; answers why."""
        assert self.process is not None, "load or adopt comes first"
        code = await self.process.wait()
        if self._verdict is not None:
            return self._verdict
        return self._engine.explain_failure(tail(self._log, self._log_offset), code)

    def stop(self) -> None:
        """Ask the process to end; whoever runs `load` or `ended` gets to know."""
        self.is_stopping = True
        if self.process is not None:
            self.process.terminate()
            asyncio.get_running_loop().call_later(STOP_TIMEOUT + 5, self.process.kill)
        elif self._is_loading and self.task is not None:
            # Before its first step a cancelled task would end without a word to anybody; `load` sees to that case.
            self.task.cancel()

    @property
    def may_hang(self) -> bool:
        """It is ready, a process of ours, and not on its way out."""
        is_ready = self.ready_at is not None and not self.is_stopping and self._verdict is None
        return is_ready and self.process is not None and self.process.pid != 0

    def kill(self, reason: str) -> None:
        """End it at once: it does not do what it is for. `ended` answers `reason`."""
        self._verdict = reason
        if self.process is not None:
            self.process.kill()

    async def clean_up(self) -> None:
        """Returns when the process is gone and nothing of it is left in the run directory."""
        if self.process is not None:
            await end(self.process)
        self._around.records.remove(self.id)

    async def _load(self) -> None:
        logger.info("loading model {} with {}", self.model, self._engine.name)
        self.facts = await asyncio.to_thread(self._engine.inspect, self._spec.entry)
        socket = self._around.sockets / f"{self.id}.sock"
        plan = self._engine.plan(self._spec.served_name, self._spec.entry, socket, self.placement)
        self.info = self._info_of(plan)
        if plan.argv:
            await self._start(plan)
            await self._wait_ready(plan)
        else:
            self.process = NoProcess()
        self.ready_at = time.time()
        self.load_seconds = self.ready_at - self._started_at
        self.phases.on_ready(self.ready_at)
        self._write_record()
        logger.info("model {} ready after {:.1f} s ({})", self.model, self.load_seconds, describe(self.phases.seconds))

    def _info_of(self, plan: LaunchPlan) -> InstanceInfo:
        return InstanceInfo(
            id=self.id,
            model=self._spec.served_name,
            engine=self._engine.name,
            address=plan.address,
            upstream_model=plan.upstream_model,
            headers=plan.headers,
            context_length=self.facts.context_length,
            tasks=self.facts.tasks,
        )

    async def _start(self, plan: LaunchPlan) -> None:
        try:
            self.process = await self._around.launcher.start(plan, self._log)
        except OSError as error:
            raise ModelProblem(f"the engine cannot be started: {error.strerror}") from error
        self.phases.on_started(time.time())
        self._write_record()

    async def _wait_ready(self, plan: LaunchPlan) -> None:
        """Raises `ModelProblem` when the process ends before it is ready."""
        assert self.process is not None, "started just before"
        ready = asyncio.create_task(self._engine.wait_ready(plan))
        ended = asyncio.create_task(self.process.wait())
        watch = asyncio.create_task(self._watch_phases())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ModelProblem(self._engine.explain_failure(tail(self._log, self._log_offset), ended.result()))
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

    def _write_record(self) -> None:
        """Nothing to adopt where nothing was started."""
        if self.process is None or self.info is None or not self.process.pid:
            return
        self._around.records.write(
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
                is_pinned=self.is_pinned,
            )
        )


async def end(process: Process) -> None:
    """Returns when the process is gone; asks first, then kills."""
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
