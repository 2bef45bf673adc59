"""The devices of this host, GPUs and RAM, how much of each is in use, and how much of that by others. For the manager.

`Inventory` is the seam for other hosts, and for tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from llm_api_server.config import DevicesConfig
from llm_api_server.engines.host import Host
from llm_api_server.manager.booking import Booking
from llm_api_server.manager.ledger import RAM, Device

#: Of RAM, what models may take when nothing is configured.
_RAM_SHARE = 0.95
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
#: Seconds that a driver may take to free what a process or a sleeper gave up.
_RELEASE_TIMEOUT = 15.0
_RELEASE_INTERVAL = 0.1
#: Bytes by which the use of a GPU may differ without meaning.
_TOLERANCE = 512 * 1024**2

Foreign = Mapping[str, int]
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
    """What others hold of the devices, as seen whenever it is asked."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self.devices = inventory.devices

    async def foreign(self, bookings: Iterable[Booking], measured: Measured, leaving: str | None = None) -> Foreign:
        """What is in use less what is ours; of `leaving` only what it keeps is ours any more."""
        used = await asyncio.to_thread(self._inventory.used)
        held: dict[str, int] = {}
        for booking in bookings:
            takes = dict(booking.will_take if booking.id == leaving else booking.takes)
            if RAM in takes and (size := await asyncio.to_thread(measured, booking.id)) is not None:
                takes[RAM] = size
            for device, size in takes.items():
                held[device] = held.get(device, 0) + size
        return {device: max(0, size - held.get(device, 0)) for device, size in used.items()}

    async def see_free(
        self, booking: Booking, before: Foreign, look: Callable[[], Awaitable[Foreign]]
    ) -> tuple[Foreign, bool]:
        """Wait until the GPU memory that `booking` gave up is no longer in use; `look` sees it as others'. Answers the
        last look, and whether it was free in time. The kernel frees RAM before it reports the end of a process.
        """
        gpus = [seat.device for seat in booking.placement.seats if seat.index is not None]
        end = asyncio.get_running_loop().time() + _RELEASE_TIMEOUT
        while True:
            now = await look()
            if all(now.get(gpu, 0) <= before.get(gpu, 0) + _TOLERANCE for gpu in gpus):
                return now, True
            if asyncio.get_running_loop().time() > end:
                return now, False
            await asyncio.sleep(_RELEASE_INTERVAL)


def _gpus(wanted: Sequence[int] | None) -> Inventory:
    from llm_api_server.manager.nvml import NvidiaInventory  # noqa: PLC0415 - only where there is a driver

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
