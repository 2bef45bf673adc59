"""Arithmetic of device memory: what is allocated, and what else fits where. Pure; sizes in bytes.

A `MemoryBudget` is a snapshot. Placement compares two of them: the current one, and the projected one for when every
instance that leaves has left. A model starts where it fits both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import NO_PLACEMENT, DeviceAllocation, Need, Placement
from llm_api_server.engines.explain import OUT_OF_MEMORY
from llm_api_server.formats import memory_size

#: Bytes left free on a GPU for a soft share: the measurement is not exact, and a driver takes some.
_MARGIN = 256 * 1024**2


@dataclass
class MemoryBudget:
    """Bytes of each device that our instances have (`allocated`) and other programs hold (`foreign`).

    `models_left` is the number of further models that `max_loaded` allows.
    """

    devices: Sequence[Device]
    foreign: Mapping[str, int]
    models_left: int
    allocated: dict[str, int] = field(default_factory=dict)

    def copy(self) -> MemoryBudget:
        return MemoryBudget(self.devices, self.foreign, self.models_left, dict(self.allocated))

    def add(self, memory: Mapping[str, int], *, models: int = 0) -> None:
        for device, size in memory.items():
            self.allocated[device] = self.allocated.get(device, 0) + size
        self.models_left -= models

    def remove(self, memory: Mapping[str, int], *, models: int = 0) -> None:
        self.add({device: -size for device, size in memory.items()}, models=-models)

    def free(self, device: Device) -> int:
        """Return the bytes that models can still get: within the limit, and within what other programs leave."""
        ours = self.allocated.get(device.id, 0)
        return min(device.capacity - ours, device.total - self.foreign.get(device.id, 0) - ours)

    def fits(self, memory: Mapping[str, int]) -> bool:
        """Return whether this much more fits on these very devices, as one more model."""
        devices = {device.id: device for device in self.devices}
        return self.models_left > 0 and all(size <= self.free(devices[d]) for d, size in memory.items() if size > 0)

    def place(self, need: Need | None) -> Placement | None:
        """Return where an instance fits: the devices it fills best, preferably all of one size."""
        if self.models_left <= 0:
            return None
        if need is None:
            return NO_PLACEMENT
        fitting = [
            (device, size)
            for device in self.devices
            if (size := size_on(device, need, self.foreign)) is not None and size <= self.free(device)
        ]
        chosen = self._choose(fitting, need.count)
        if chosen is None:
            return None
        is_shared = any(self.allocated.get(device.id, 0) > 0 for device, _ in chosen)
        devices = (DeviceAllocation(device.id, size, device.total, device.index) for device, size in chosen)
        return Placement(tuple(devices), is_shared)

    def _choose(self, fitting: list[tuple[Device, int]], count: int) -> list[tuple[Device, int]] | None:
        def rest(pair: tuple[Device, int]) -> int:
            return self.free(pair[0]) - pair[1]

        by_size = sorted(fitting, key=lambda pair: pair[0].total)
        groups = [sorted(group, key=rest)[:count] for _, group in groupby(by_size, key=lambda pair: pair[0].total)]
        complete = [group for group in groups if len(group) == count]
        if complete:
            return min(complete, key=lambda group: sum(rest(pair) for pair in group))
        mixed = sorted(fitting, key=rest)[:count]
        return mixed if len(mixed) == count else None


def memory_of(placement: Placement) -> dict[str, int]:
    """Return the bytes of each device."""
    return {device.device: device.size for device in placement.devices}


def tighter(one: MemoryBudget, other: MemoryBudget) -> MemoryBudget:
    """Return a budget in which fits exactly what fits both."""
    devices = {*one.allocated, *other.allocated}
    allocated = {device: max(one.allocated.get(device, 0), other.allocated.get(device, 0)) for device in devices}
    return MemoryBudget(one.devices, one.foreign, min(one.models_left, other.models_left), allocated)


def size_on(device: Device, need: Need, foreign: Mapping[str, int]) -> int | None:
    """Return what `need` takes of this device if none of our instances is on it; None if it cannot run there."""
    if device.kind != need.kind or (need.gpus is not None and device.index not in need.gpus):
        return None
    if need.share is None:
        return need.min_bytes if need.min_bytes <= device.capacity else None
    size = int(need.share * device.total)
    if need.is_share_soft:
        size = min(size, device.capacity, device.total - foreign.get(device.id, 0) - _MARGIN)
    return size if need.min_bytes <= size <= device.capacity else None


def permanent_obstacle(need: Need, devices: Sequence[Device]) -> str | None:
    """Return the arithmetic if `need` does not fit even on empty devices, else None."""
    if MemoryBudget(devices, {}, 1).place(need) is not None:
        return None
    return f"{OUT_OF_MEMORY}: it needs {describe(need)}, but there {_sizes(need, devices)}"


def foreign_obstacle(need: Need, empty: MemoryBudget) -> str | None:
    """Return the arithmetic if `need` does not fit because of other programs. `empty` holds no instance of ours."""
    if empty.place(need) is not None:
        return None
    held = ", ".join(
        f"{memory_size(size)} of {device.id}"
        for device in empty.devices
        if (size := empty.foreign.get(device.id, 0)) > 0
    )
    return f"{OUT_OF_MEMORY}: it needs {describe(need)}, and other programs hold {held}"


def describe(need: Need) -> str:
    """Return for example `2 GPUs, each with 40.0 GiB free (38.0 GiB of weights and cache)`."""
    note = f" ({need.note})" if need.note else ""
    if need.kind == "ram":
        return f"{memory_size(need.min_bytes)} of RAM{note}"
    gpus = f"{need.count} GPUs, each with" if need.count > 1 else "a GPU with"
    if need.share is None:
        return f"{gpus} {memory_size(need.min_bytes)} free{note}"
    share = f"{'up to ' if need.is_share_soft else ''}{need.share:.0%}"
    return f"{gpus} {share} free, at least {memory_size(need.min_bytes)}{note}"


def _sizes(need: Need, devices: Sequence[Device]) -> str:
    sizes = [memory_size(device.capacity) for device in devices if device.kind == need.kind]
    if not sizes:
        return f"is no {'GPU' if need.kind == 'gpu' else 'RAM known'}"
    verb = "is" if len(sizes) == 1 else "are"
    return f"{verb} {', '.join(sizes)}{' of RAM for models' if need.kind == 'ram' else ''}"
