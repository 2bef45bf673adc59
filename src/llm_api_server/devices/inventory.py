"""The devices of this host, GPUs and RAM, and how much of each is in use. `Inventory` is the seam for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from llm_api_server.config.models import DevicesConfig
from llm_api_server.devices.device import RAM, Device
from llm_api_server.devices.host import CGROUP, Host

#: Fraction of RAM that models may take if nothing is configured.
_RAM_SHARE = 0.95
_MEMINFO = Path("/proc/meminfo")


class Inventory(Protocol):
    """Devices, and the memory in use on them."""

    @property
    def devices(self) -> Sequence[Device]: ...

    def used(self) -> Mapping[str, int]:
        """Return the bytes in use on each device, by any program; unreadable devices are left out. Blocking."""


class HostInventory:
    """NVIDIA devices, read with NVML, and RAM."""

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


def _gpus(wanted: Sequence[int] | None) -> Inventory:
    from llm_api_server.devices.nvml import NvidiaInventory  # noqa: PLC0415 - only where there is a driver

    return NvidiaInventory(wanted)


def _available_ram(total: int) -> int:
    """Return the bytes that programs can still get without swapping; in a container, within its limit."""
    lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, KeyError):  # no cgroup v2
        current = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        available = min(available, total - (current - int(stat["inactive_file"])))
    return max(0, available)
