"""A fake machine: devices in place of those of the driver and /proc."""

from __future__ import annotations

from collections.abc import Mapping

from llm_api_server.devices.device import RAM, Device

GIB = 1024**3


def gpus(*sizes: int) -> list[Device]:
    """Return GPUs of these sizes in GiB."""
    return [Device(f"gpu{index}", "gpu", size * GIB, "a GPU", index) for index, size in enumerate(sizes)]


def ram(size: int) -> Device:
    return Device(RAM, "ram", size * GIB, "RAM")


class Machine:
    """A `devices.Inventory`. `in_use` has the GiB in use by device."""

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.in_use: dict[str, float] = {}

    def used(self) -> Mapping[str, int]:
        return {device.id: int(self.in_use.get(device.id, 0) * GIB) for device in self.devices}
