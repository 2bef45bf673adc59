"""A device with memory for models: a GPU, or the RAM of this host. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llm_api_server.types import DeviceKind

#: The id of the device that is RAM.
RAM = "ram"


@dataclass(frozen=True)
class Device:
    """`total` is the physical size in bytes, to which shares refer; `limit` is the most that models may take of it."""

    id: str
    kind: DeviceKind
    total: int
    name: str = ""
    index: int | None = None
    limit: int | None = None

    @property
    def capacity(self) -> int:
        return self.total if self.limit is None else min(self.limit, self.total)
