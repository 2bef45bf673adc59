"""Who has how much of which device's memory, and what would fit where. Pure; bytes throughout.

The scheduler keeps one account of what is taken now and one of what will be when those that leave have left
(`MemoryBudget`). A model starts where it fits both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from llm_api_server.devices.device import Device
from llm_api_server.engines.base import NO_PLACEMENT, DeviceAllocation, Need, Placement
from llm_api_server.engines.explain import OUT_OF_MEMORY
from llm_api_server.formats import memory_size

_GIB = 1024**3
#: Left free on a GPU whose share is soft: measuring is not exact, and a driver takes some.
_MARGIN = _GIB // 4


@dataclass
class MemoryBudget:
    """Bytes taken of each device, by ours (`taken`) and by other programs (`foreign`), and the places left."""

    devices: Sequence[Device]
    foreign: Mapping[str, int]
    places: int
    taken: dict[str, int] = field(default_factory=dict)

    def copy(self) -> MemoryBudget:
        return MemoryBudget(self.devices, self.foreign, self.places, dict(self.taken))

    def add(self, taken: Mapping[str, int], *, places: int = 0) -> None:
        for device, size in taken.items():
            self.taken[device] = self.taken.get(device, 0) + size
        self.places -= places

    def remove(self, taken: Mapping[str, int], *, places: int = 0) -> None:
        self.add({device: -size for device, size in taken.items()}, places=-places)

    def free(self, device: Device) -> int:
        """Of what is not ours, the limit only keeps what is left after it."""
        ours = self.taken.get(device.id, 0)
        return min(device.capacity - ours, device.total - self.foreign.get(device.id, 0) - ours)

    def fits(self, taken: Mapping[str, int]) -> bool:
        """Whether this much more fits on these very devices, and there is a place."""
        sizes = {device.id: device for device in self.devices}
        return self.places > 0 and all(size <= self.free(sizes[d]) for d, size in taken.items() if size > 0)

    def place(self, need: Need | None) -> Placement | None:
        """Where an instance fits now: the devices that it fills best, of one size where there are enough of one."""
        if self.places <= 0:
            return None
        if need is None:
            return NO_PLACEMENT
        fitting = [
            (device, amount)
            for device in self.devices
            if (amount := amount_on(device, need, self.foreign)) is not None and amount <= self.free(device)
        ]
        chosen = _choose(fitting, need.count, self)
        if chosen is None:
            return None
        seats = tuple(DeviceAllocation(device.id, amount, device.total, device.index) for device, amount in chosen)
        return Placement(seats, is_shared=any(self.taken.get(seat.device, 0) > 0 for seat in seats))


def taken_by(placement: Placement) -> dict[str, int]:
    return {seat.device: seat.size for seat in placement.devices}


def tighter(one: MemoryBudget, other: MemoryBudget) -> MemoryBudget:
    """An account in which fits what fits both."""
    devices = {*one.taken, *other.taken}
    taken = {device: max(one.taken.get(device, 0), other.taken.get(device, 0)) for device in devices}
    return MemoryBudget(one.devices, one.foreign, min(one.places, other.places), taken)


def amount_on(device: Device, need: Need, foreign: Mapping[str, int]) -> int | None:
    """What `need` takes of this device when nothing else of ours is there; None when it cannot run on it."""
    if device.kind != need.kind or (need.gpus is not None and device.index not in need.gpus):
        return None
    if need.share is None:
        return need.min_bytes if need.min_bytes <= device.capacity else None
    wanted = int(need.share * device.total)
    if need.is_share_soft:
        wanted = min(wanted, device.capacity, device.total - foreign.get(device.id, 0) - _MARGIN)
    return wanted if need.min_bytes <= wanted <= device.capacity else None


def why_never(need: Need, devices: Sequence[Device]) -> str | None:
    """The arithmetic when it could not be placed on empty devices, else None."""
    if MemoryBudget(devices, {}, 1).place(need) is not None:
        return None
    return f"{OUT_OF_MEMORY}: it needs {describe(need)}, but there {_have(need, devices)}"


def why_not_now(need: Need, account: MemoryBudget) -> str | None:
    """The arithmetic when it would not fit even with all of our instances gone, because of other programs."""
    if MemoryBudget(account.devices, account.foreign, 1).place(need) is not None:
        return None
    held = ", ".join(
        f"{memory_size(size)} of {device.id}"
        for device in account.devices
        if (size := account.foreign.get(device.id, 0)) > 0
    )
    return f"{OUT_OF_MEMORY}: it needs {describe(need)}, and other programs hold {held}"


def describe(need: Need) -> str:
    """`2 GPUs with 40.0 GiB each (38.0 GiB of weights and cache)`"""
    note = f" ({need.note})" if need.note else ""
    if need.kind == "ram":
        return f"{memory_size(need.min_bytes)} of RAM{note}"
    who = f"{need.count} GPUs, each with" if need.count > 1 else "a GPU with"
    if need.share is None:
        return f"{who} {memory_size(need.min_bytes)} free{note}"
    share = f"{'up to ' if need.is_share_soft else ''}{need.share:.0%}"
    return f"{who} {share} free, at least {memory_size(need.min_bytes)}{note}"


def _have(need: Need, devices: Sequence[Device]) -> str:
    sizes = [memory_size(device.capacity) for device in devices if device.kind == need.kind]
    if not sizes:
        return f"is no {'GPU' if need.kind == 'gpu' else 'RAM known'}"
    verb = "is" if len(sizes) == 1 else "are"
    return f"{verb} {', '.join(sizes)}{' of RAM for models' if need.kind == 'ram' else ''}"


def _choose(fitting: list[tuple[Device, int]], count: int, account: MemoryBudget) -> list[tuple[Device, int]] | None:
    def rest(pair: tuple[Device, int]) -> int:
        return account.free(pair[0]) - pair[1]

    by_size = sorted(fitting, key=lambda pair: pair[0].total)
    groups = [sorted(group, key=rest)[:count] for _, group in groupby(by_size, key=lambda pair: pair[0].total)]
    whole = [group for group in groups if len(group) == count]
    if whole:
        return min(whole, key=lambda group: sum(rest(pair) for pair in group))
    mixed = sorted(fitting, key=rest)[:count]
    return mixed if len(mixed) == count else None
