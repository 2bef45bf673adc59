"""The contract between the manager and the engine adapters: what to start for a model, when it is ready, why it failed.

An adapter is pure where it can be: a model entry goes in, arguments, environment and addresses come out. The code that
runs inside an engine process imports only the standard library and the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from llm_api_server.config.models import ModelConfig
from llm_api_server.types import DeviceKind, EngineName, Task


class ModelProblem(Exception):
    """The model cannot be loaded. The message goes to the client: it gives the reason, without paths of this host."""


@dataclass(frozen=True)
class Need:
    """Device memory that an instance needs, the same on each of its `count` devices.

    Without `share` it needs `min_bytes`. With `share` it takes that fraction of the device, and cannot start where the
    fraction is less than `min_bytes`. A soft share shrinks to what other programs leave.
    """

    kind: DeviceKind
    min_bytes: int
    count: int = 1
    share: float | None = None
    is_share_soft: bool = False
    #: The engine sizes its cache by the free memory it finds, so no other instance may start on its devices meanwhile.
    measures_memory: bool = False
    #: Indexes of the GPUs that it may use, as the driver counts them; None: all.
    gpus: tuple[int, ...] | None = None
    #: How `min_bytes` is made up, for messages.
    note: str = ""


@dataclass(frozen=True)
class SleepFootprint:
    """Memory that a sleeping instance keeps, in bytes: on each device, and in RAM for its weights (level 1)."""

    device_bytes: int
    weight_bytes: int


class DeviceAllocation(msgspec.Struct, frozen=True, rename={"size": "taken"}):
    """Part of a device given to an instance, in bytes. `index` is the driver's number of a GPU."""

    device: str
    size: int
    total: int
    index: int | None = None


class Placement(msgspec.Struct, frozen=True, rename={"devices": "seats"}):
    """The devices of an instance. `is_shared`: another instance of this server has memory on one of them.

    Adoption records hold placements: the names in JSON (`seats`, `taken`) must not change.
    """

    devices: tuple[DeviceAllocation, ...]
    is_shared: bool = False

    @property
    def share(self) -> float:
        """The largest fraction of memory that is available on every device."""
        return min(device.size / device.total for device in self.devices)


#: The placement of an instance that takes no memory on this host.
NO_PLACEMENT = Placement(())


@dataclass(frozen=True)
class ModelFacts:
    """Facts from the model's own files, read without loading it. None: unknown; no `need`: it takes no memory here.

    `tasks` are those of one process. `embedding_tasks` are those of a second process of the same weights, started to
    embed.
    """

    context_length: int | None = None
    vision: bool | None = None
    tasks: tuple[Task, ...] | None = None
    embedding_tasks: tuple[Task, ...] = ()
    need: Need | None = None
    #: Set if an instance can sleep.
    sleep_footprint: SleepFootprint | None = None
    chat_template: bool | None = None
    #: Requests that an instance runs at the same time; None: no limit.
    slots: int | None = None


@dataclass(frozen=True)
class Warmup:
    """First request to a new instance, sent before it counts as ready, so that no client pays for it."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LaunchPlan:
    """A process to start, or none (`argv` empty) for an engine that already runs elsewhere.

    `env` is added to the manager's cleaned environment. `argv` holds no secret, because every user can read it.
    """

    argv: list[str]
    address: str
    env: dict[str, str] = field(default_factory=dict)
    upstream_model: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    warmup: Warmup | None = None
    #: `argv` is `PYTHON -m MODULE ARGUMENTS…`, and a process that has imported MODULE may fork instead (`zygote.py`).
    is_forkable: bool = False


class Engine(Protocol):
    """An engine adapter: stateless, built once from the configuration."""

    name: EngineName
    #: Phases of a start, in order, each with a pattern of the log line that ends it.
    phase_marks: Sequence[tuple[str, str]]

    def inspect(self, model: ModelConfig) -> ModelFacts:
        """Read the model's files. Raises `ModelProblem` if they are missing, broken or unsupported."""

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        """Return what to start to serve `name` on the unix socket `socket`; without `placement`, on any device."""

    async def wait_ready(self, plan: LaunchPlan) -> None:
        """Wait until the instance responds, then warm it up. Raises only `CancelledError` and `ModelProblem`."""

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        """Return the engine's real reason from the end of its output: one or two sentences, without paths."""
