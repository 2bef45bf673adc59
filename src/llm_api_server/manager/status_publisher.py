"""What the manager tells of its models: all workers at once what they decide by, who asks everything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import Engine, ModelFacts
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.messages import Models
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.manager.instances.embedding_instances import EmbeddingInstances
from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.instances.model_inspection import ModelInspection
from llm_api_server.manager.scheduling.explain import device_statuses
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.status import status_of
from llm_api_server.types import ModelState

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession


class StatusPublisher:
    """`clients` are all who are connected; `running` the manager's instances, by their ids."""

    def __init__(
        self,
        config: Config,
        engines: Mapping[str, tuple[Engine, ModelConfig]],
        twins: EmbeddingInstances,
        scheduler: Scheduler,
        files: ModelInspection,
        running: Mapping[str, Instance],
    ) -> None:
        self.clients: set[WorkerSession] = set()
        self._config = config
        self._engines = engines
        self._twins = twins
        self._scheduler = scheduler
        self._files = files
        self._running = running
        self._last_used: dict[str, float] = {}
        #: By what the last word to the workers would be another.
        self._told: list[tuple[str, ModelState, str | None, ModelFacts]] = []

    def configure(self, config: Config) -> None:
        self._config = config
        self._told.clear()

    def note_use(self, model: str) -> None:
        self._last_used[model] = time.time()

    def is_at_work(self, instance: str) -> bool:
        """Whether requests are in flight there whose clients read what comes."""
        return any(client.in_flight.get(instance, 0) > client.blocked.get(instance, 0) for client in self.clients)

    async def measure(self) -> None:
        """The memory of all engines, now (which takes milliseconds per process, so in a thread)."""
        for running in list(self._running.values()):
            if running.process is not None:
                running.memory_bytes = await asyncio.to_thread(running.process.memory_bytes)

    def devices(self) -> list[DeviceStatus]:
        return device_statuses(self._scheduler)

    def engines(self) -> list[InstanceInfo]:
        """Processes of ours that have been ready."""
        running = [one for one in self._running.values() if one.ready_at is not None]
        return [one.info for one in running if one.info is not None and one.process is not None and one.process.pid]

    def statuses(self) -> list[ModelStatus]:
        """The configured models in their order, each followed by its twin while that is not stopped."""
        names = []
        for name in self._config.models.available:
            names.append(name)
            twin = self._twins.twin_of(name)
            if twin is not None and self._scheduler.models[twin].state is not ModelState.STOPPED:
                names.append(twin)
        return [self._status(name) for name in names]

    def changed(self) -> None:
        """Tell the workers if a state has changed, or what is known of a model's files. Counters are not told."""
        now = [
            (name, model.state, model.failure.reason if model.failure else None, self._files.of(name))
            for name, model in self._scheduler.models.items()
        ]
        if now == self._told:
            return
        self._told = now
        message = Models(self.statuses())
        for client in self.clients:
            if client.is_worker:
                client.send(message)

    def _status(self, name: str) -> ModelStatus:
        """The path as configured, not as resolved."""
        model, facts = self._scheduler.models[name], self._files.of(name)
        running = self._running.get(model.allocation.id) if model.allocation else None
        engine, entry = self._engines[name]
        status = status_of(model, entry, engine.name, facts, running, asyncio.get_running_loop().time())
        status.twin_of = self._twins.model_of(name)
        status.path = self._config.models.available[status.twin_of or name].path
        status.tasks = self._twins.all_tasks(name, facts)
        status.last_used = self._last_used.get(name)
        if running is not None:
            status.in_flight = self._in_flight(running.id)
        return status

    def _in_flight(self, instance: str) -> int:
        """What the workers report; a lease whose report is still to come counts as one."""
        return sum(client.in_flight.get(instance, min(1, client.grants.get(instance, 0))) for client in self.clients)
