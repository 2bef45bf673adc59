"""The instances of this manager, by id, with their memory. On the manager's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.manager.instances.instance import Instance


class RunningInstances:
    """Every instance, from the decision to start it until it is gone and its memory is free.

    Only `InstanceRunner` adds and removes instances.
    """

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances.values()))

    def __getitem__(self, instance_id: str) -> Instance:
        return self._instances[instance_id]

    def get(self, instance_id: str) -> Instance | None:
        return self._instances.get(instance_id)

    def add(self, instance: Instance) -> None:
        self._instances[instance.id] = instance

    def remove(self, instance_id: str) -> None:
        del self._instances[instance_id]

    def tasks(self) -> list[asyncio.Task[None]]:
        return [instance.task for instance in self if instance.task is not None]

    def ready_processes(self) -> list[InstanceInfo]:
        """Return the instances that have been ready and are processes of this host."""
        ready = [one for one in self if one.ready_at is not None and one.process is not None and one.process.pid]
        return [one.info for one in ready if one.info is not None]

    def memory_of(self, instance_id: str) -> int | None:
        """Return the RAM that the processes of an instance use now. Blocking: milliseconds per process."""
        instance = self.get(instance_id)
        return instance.process.memory_bytes() if instance is not None and instance.process is not None else None

    async def measure(self) -> None:
        """Update `memory_bytes` of every instance, in a thread."""
        for instance in self:
            if instance.process is not None:
                instance.memory_bytes = await asyncio.to_thread(instance.process.memory_bytes)
