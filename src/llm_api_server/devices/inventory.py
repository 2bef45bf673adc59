"""The devices of this host, GPUs and RAM, how much of each is in use, and how much of that by others. For the manager.

`Inventory` is the seam for other hosts, and for tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from loguru import logger

from llm_api_server.config.models import DevicesConfig
from llm_api_server.devices.host import Host
from llm_api_server.manager.scheduling.memory import RAM, Device
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.types import ModelState

#: Of RAM, what models may take when nothing is configured.
_RAM_SHARE = 0.95
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
#: Seconds that a driver may take to free what a process or a sleeper gave up.
_RELEASE_TIMEOUT = 15.0
_RELEASE_INTERVAL = 0.1
#: Bytes by which the use of a GPU may differ without meaning.
_TOLERANCE = 512 * 1024**2

#: The RAM that the processes of an instance really have, or None.
Measured = Callable[[str], int | None]


class Inventory(Protocol):
    @property
    def devices(self) -> Sequence[Device]: ...

    def used(self) -> Mapping[str, int]:
        """Bytes in use on each device now, whoever uses them; a device that cannot be read is left out. Blocking."""


class HostInventory:
    """NVIDIA devices by NVML, and RAM. `close` lets the driver go."""

    def __init__(self, config: DevicesConfig, host: Host) -> None:
        limit = config.memory if config.memory is not None else int(host.memory_bytes * _RAM_SHARE)
        self._ram = Device(RAM, "ram", host.memory_bytes, "RAM", limit=limit)
        self._gpus = _gpus(config.gpus) if host.has_nvidia else None
        self.devices = [*(self._gpus.devices if self._gpus is not None else []), self._ram]

    def used(self) -> Mapping[str, int]:
        used = dict(self._gpus.used()) if self._gpus is not None else {}
        with suppress(OSError, ValueError):
            used[RAM] = self._ram.total - _available_ram(self._ram.total)
        return used


class DeviceWatch:
    """Tells the scheduler what other programs hold of the devices, whenever it is asked to look."""

    def __init__(self, inventory: Inventory, scheduler: Scheduler, measured: Measured) -> None:
        self._inventory = inventory
        self._scheduler = scheduler
        self._measured = measured

    async def observe(self) -> None:
        self._scheduler.observe(await self._foreign())

    async def see_free(self, instance: str) -> bool:
        """Wait until the GPU memory that an instance gave up is no longer in use. What a process that is gone leaves in
        use counts as others' from then on. The kernel frees RAM before it reports the end of a process.
        """
        booking = self._scheduler.bookings.get(instance)
        if booking is None or not booking.placement.seats:
            return True
        gpus = [seat.device for seat in booking.placement.seats if seat.index is not None]
        before = self._scheduler.foreign
        end = asyncio.get_running_loop().time() + _RELEASE_TIMEOUT
        while True:
            now = await self._foreign(leaving=instance)
            is_free = all(now.get(gpu, 0) <= before.get(gpu, 0) + _TOLERANCE for gpu in gpus)
            if is_free or asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(_RELEASE_INTERVAL)
        if is_free or booking.state is not ModelState.SLEEPING:
            self._scheduler.observe(now)
        return is_free

    async def _foreign(self, leaving: str | None = None) -> Mapping[str, int]:
        """What is in use less what is ours; of `leaving` only what it keeps is ours any more."""
        while True:
            held = self._held(leaving)
            try:
                used = await asyncio.to_thread(self._used)
            except Exception:  # noqa: BLE001 - a driver that fails must not hold up requests
                logger.exception("the devices cannot be looked at")
                return self._scheduler.foreign
            if self._held(leaving) == held:  # else the books changed between the two looks
                return {device: max(0, size - held.get(device, 0)) for device, size in used.items()}

    def _held(self, leaving: str | None) -> dict[str, int]:
        held: dict[str, int] = {}
        for booking in self._scheduler.bookings.values():
            for device, size in (booking.will_take if booking.id == leaving else booking.takes).items():
                held[device] = held.get(device, 0) + size
        return held

    def _used(self) -> Mapping[str, int]:
        """As the machine says, but of RAM our instances use what the books have: they grow into it."""
        used = dict(self._inventory.used())
        for booking in list(self._scheduler.bookings.values()):
            if RAM in booking.takes and (size := self._measured(booking.id)) is not None:
                used[RAM] = max(0, used.get(RAM, 0) - size) + booking.takes[RAM]
        return used


def _gpus(wanted: Sequence[int] | None) -> Inventory:
    from llm_api_server.devices.nvml import NvidiaInventory  # noqa: PLC0415 - only where there is a driver

    return NvidiaInventory(wanted)


def _available_ram(total: int) -> int:
    """What programs can still get without swapping; in a container, of its own share."""
    lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, KeyError):  # no cgroup v2
        current = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        available = min(available, total - (current - int(stat["inactive_file"])))
    return max(0, available)
