"""Status of the models: published to the workers on every change of state, and returned on request."""

from __future__ import annotations

import asyncio
import time

from llm_api_server.engines.base import ModelFacts
from llm_api_server.ipc.messages import Models
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.instances.model_registry import ModelRegistry
from llm_api_server.manager.instances.running_instances import RunningInstances
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.status import status_of
from llm_api_server.manager.worker_session import WorkerSessions
from llm_api_server.types import ModelState


class StatusPublisher:
    """Status of every model, and the part of it that was last published."""

    def __init__(
        self, sessions: WorkerSessions, registry: ModelRegistry, scheduler: Scheduler, instances: RunningInstances
    ) -> None:
        self._sessions = sessions
        self._registry = registry
        self._scheduler = scheduler
        self._instances = instances
        self._last_used: dict[str, float] = {}
        #: The part of the last published status that is compared. Counters are not, so that they cause no messages.
        self._published: list[tuple[str, ModelState, str | None, ModelFacts]] = []

    def reset(self) -> None:
        """Publish at the next call in any case: entries or the order of the models have changed."""
        self._published.clear()

    def mark_used(self, model: str) -> None:
        self._last_used[model] = time.time()

    def statuses(self) -> list[ModelStatus]:
        """Return the configured models in their order, each followed by its embedding instance unless stopped."""
        names = []
        for name in self._registry.specs.models:
            names.append(name)
            embedding = self._registry.embedding_of(name)
            if embedding is not None and self._scheduler.models[embedding].state is not ModelState.STOPPED:
                names.append(embedding)
        return [self._status(name) for name in names]

    def publish_changes(self) -> None:
        """Send the status to the workers if a state, a failure or the facts of a model have changed."""
        current = [
            (name, model.state, model.failure.reason if model.failure else None, self._registry.facts_of(name))
            for name, model in self._scheduler.models.items()
        ]
        if current == self._published:
            return
        self._published = current
        self._sessions.publish(Models(self.statuses()))

    def _status(self, name: str) -> ModelStatus:
        model, facts = self._scheduler.models[name], self._registry.facts_of(name)
        instance = self._instances.get(model.allocation.id) if model.allocation else None
        status = status_of(model, self._registry.specs[name], facts, instance, asyncio.get_running_loop().time())
        status.twin_of = self._registry.model_of(name)
        status.tasks = self._registry.all_tasks(name)
        status.last_used = self._last_used.get(name)
        if instance is not None:
            status.in_flight = self._sessions.in_flight(instance.id)
        return status
