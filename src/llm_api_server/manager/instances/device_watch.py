"""Measures what other programs hold of the devices, and reports it to the scheduler. On the manager's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from loguru import logger

from llm_api_server.devices.device import RAM
from llm_api_server.devices.inventory import Inventory
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.types import ModelState

#: Seconds that a driver may take to free the memory of a process that ended or fell asleep.
RELEASE_TIMEOUT = 15.0
_RELEASE_INTERVAL = 0.1
#: Bytes by which the use of a GPU may vary without meaning.
_TOLERANCE = 512 * 1024**2


class DeviceWatch:
    """`measure` returns the RAM that the processes of an instance use now, or None."""

    def __init__(
        self,
        inventory: Inventory,
        scheduler: Scheduler,
        measure: Callable[[str], int | None],
        *,
        release_timeout: float = RELEASE_TIMEOUT,
    ) -> None:
        self._inventory = inventory
        self._scheduler = scheduler
        self._measure = measure
        self._release_timeout = release_timeout

    async def observe(self) -> None:
        """Report to the scheduler what other programs hold now."""
        self._scheduler.update_foreign(await self._foreign())

    async def wait_freed(self, instance: str) -> bool:
        """Wait until the GPU memory that an instance gave up is no longer in use; return False after a timeout.

        Memory still in use after a process has ended counts as foreign from then on. RAM needs no wait: the kernel
        frees it before it reports the end of a process.
        """
        allocation = self._scheduler.allocations.get(instance)
        if allocation is None or not allocation.placement.devices:
            return True
        gpus = [device.device for device in allocation.placement.devices if device.index is not None]
        before = self._scheduler.foreign
        end = asyncio.get_running_loop().time() + self._release_timeout
        while True:
            now = await self._foreign(leaving=instance)
            is_free = all(now.get(gpu, 0) <= before.get(gpu, 0) + _TOLERANCE for gpu in gpus)
            if is_free or asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(_RELEASE_INTERVAL)
        if is_free or allocation.state is not ModelState.SLEEPING:
            self._scheduler.update_foreign(now)
        return is_free

    async def _foreign(self, leaving: str | None = None) -> Mapping[str, int]:
        """Return the memory in use less our own. Of `leaving`, only what it will keep counts as our own."""
        while True:
            own = self._own(leaving)
            try:
                used = await asyncio.to_thread(self._used)
            except Exception:  # noqa: BLE001 - a driver that fails must not hold up requests
                logger.exception("the device memory cannot be measured")
                return self._scheduler.foreign
            if self._own(leaving) == own:  # else an allocation changed during the measurement
                return {device: max(0, size - own.get(device, 0)) for device, size in used.items()}

    def _own(self, leaving: str | None) -> dict[str, int]:
        own: dict[str, int] = {}
        for allocation in self._scheduler.allocations.values():
            memory = allocation.projected_memory if allocation.id == leaving else allocation.memory
            for device, size in memory.items():
                own[device] = own.get(device, 0) + size
        return own

    def _used(self) -> Mapping[str, int]:
        """Return the memory in use, with our instances' RAM counted as allocated: they grow into it."""
        used = dict(self._inventory.used())
        for allocation in list(self._scheduler.allocations.values()):
            if RAM in allocation.memory and (size := self._measure(allocation.id)) is not None:
                used[RAM] = max(0, used.get(RAM, 0) - size) + allocation.memory[RAM]
        return used
