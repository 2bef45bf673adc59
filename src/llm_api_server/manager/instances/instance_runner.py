"""Runner of the instances. One task per instance lasts from start to end, and alone reports the end."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from loguru import logger

from llm_api_server.engines.base import ModelProblem, Placement
from llm_api_server.engines.sleep import SleepFailed
from llm_api_server.event_loop.background import TaskSet
from llm_api_server.manager.instances.adoption_records import AdoptionRecord
from llm_api_server.manager.instances.device_watch import DeviceWatch
from llm_api_server.manager.instances.instance import Instance, InstanceContext, end
from llm_api_server.manager.instances.model_registry import ModelSpec
from llm_api_server.manager.instances.process import Process
from llm_api_server.manager.instances.running_instances import RunningInstances

#: Seconds that an instance may take to fall asleep, or to wake.
_SLEEP_TIMEOUT = 120.0


class InstanceEvents(Protocol):
    """Receiver of what happens to instances."""

    def on_ready(self, instance: Instance) -> None:
        """Handle the end of a load that succeeded."""

    def on_dying(self, instance: Instance) -> None:
        """Handle an end that was just noticed; `on_ended` follows once the process and its memory are gone."""

    def on_ended(self, instance: Instance, reason: str) -> None:
        """Handle the end of an instance, which was stopped (`is_stopping`) or ended for `reason`."""

    def on_slept(self, instance: Instance, from_level: int, *, is_asleep: bool) -> None:
        """Handle the end of an attempt to put an instance to sleep. `is_asleep`: it sleeps, and its memory is free."""

    def on_woken(self, instance: Instance, *, is_awake: bool) -> None:
        """Handle the end of an attempt to wake an instance."""


class InstanceRunner:
    """Runner that starts, adopts, stops, puts to sleep and wakes instances, and reports to `events`."""

    def __init__(
        self, context: InstanceContext, instances: RunningInstances, devices: DeviceWatch, events: InstanceEvents
    ) -> None:
        self._context = context
        self._instances = instances
        self._devices = devices
        self._events = events
        self._tasks = TaskSet()

    def start(self, instance_id: str, model: str, spec: ModelSpec, placement: Placement, *, is_pinned: bool) -> None:
        """Begin to load an instance."""
        self._run(Instance(instance_id, model, spec, self._context, placement, is_pinned=is_pinned))

    def adopt(self, record: AdoptionRecord, spec: ModelSpec, process: Process) -> None:
        """Take over a ready instance of an earlier manager."""
        instance = Instance(
            record.info.id, record.model, spec, self._context, record.placement, is_pinned=record.is_pinned
        )
        instance.adopt(record, process)
        self._run(instance)
        logger.info("adopted model {} (instance {}, pid {})", instance.model, instance.id, process.pid)

    async def end_left_behind(self, record: AdoptionRecord, process: Process) -> None:
        """End a process of an earlier manager that is not adopted."""
        logger.info("ending instance {} of {}, left by an earlier manager", record.info.id, record.model)
        await end(process)
        self._context.records.remove(record.info.id)

    def sleep(self, instance_id: str, level: int, from_level: int) -> None:
        """Begin to put an instance to sleep."""
        self._tasks.start(self._sleep(self._instances[instance_id], level, from_level))

    def wake(self, instance_id: str, level: int) -> None:
        """Begin to wake an instance."""
        self._tasks.start(self._wake(self._instances[instance_id], level))

    def stop(self, instance_id: str) -> None:
        self._instances[instance_id].stop()

    async def wait_all_ended(self) -> None:
        if tasks := self._instances.tasks():
            await asyncio.wait(tasks)

    async def leave(self) -> None:
        """Stop running the instances without ending them, for another manager to adopt."""
        tasks = self._instances.tasks()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tasks.cancel()

    def _run(self, instance: Instance) -> None:
        self._instances.add(instance)
        instance.task = asyncio.create_task(self._live(instance))

    async def _live(self, instance: Instance) -> None:
        """Load the instance, wait for its end, and report it, however it ended."""
        reason = ""
        try:
            if instance.ready_at is None:
                await instance.load()
                self._events.on_ready(instance)
            reason = await instance.wait_ended()
        except ModelProblem as problem:
            reason = str(problem)
        except asyncio.CancelledError:
            if not instance.is_stopping:
                raise
        except Exception:  # noqa: BLE001 - the edge of the instance's task; logged, and the model shows it
            logger.exception("instance {} of {} failed inside the manager", instance.id, instance.model)
            reason = "internal error in the manager; see its log"
        self._events.on_dying(instance)
        await instance.clean_up()
        await self._devices.wait_freed(instance.id)
        self._instances.remove(instance.id)
        if instance.is_stopping:
            logger.info("model {} unloaded", instance.model)
        else:
            logger.error("model {} failed: {}", instance.model, reason)
        self._events.on_ended(instance, reason)

    async def _sleep(self, instance: Instance, level: int, from_level: int) -> None:
        problem = None
        try:
            async with asyncio.timeout(_SLEEP_TIMEOUT):
                await instance.sleep(level, from_level=from_level)
            if not await self._devices.wait_freed(instance.id):
                problem = "its memory was not freed"
        except (SleepFailed, TimeoutError) as error:
            problem = str(error) or "it took too long"
        if problem is None:
            logger.info("model {} sleeps (level {})", instance.model, level)
        else:
            logger.warning("model {} does not sleep, so it is unloaded: {}", instance.model, problem)
        self._events.on_slept(instance, from_level, is_asleep=problem is None)

    async def _wake(self, instance: Instance, level: int) -> None:
        started = time.monotonic()
        problem = None
        try:
            async with asyncio.timeout(_SLEEP_TIMEOUT):
                await instance.wake(level)
        except (SleepFailed, TimeoutError) as error:
            problem = str(error) or "it took too long"
        if problem is None:
            logger.info("model {} awake after {:.1f} s", instance.model, time.monotonic() - started)
        else:
            logger.warning("model {} does not wake, so it is reloaded: {}", instance.model, problem)
        self._events.on_woken(instance, is_awake=problem is None)
