"""What the manager asks of an engine: which process to start for a model, when it is ready, why it failed.

An adapter is pure where it can be (model entry -> arguments, environment, addresses). The code that runs inside an
engine process imports the standard library and the engine, nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.types import EngineName, Task


class ModelProblem(Exception):
    """The model cannot be loaded; the message is for the client and says why, without paths of this machine."""


DeviceKind = Literal["gpu", "ram"]


@dataclass(frozen=True)
class Need:
    """Device memory that an instance takes, the same of each of its `count` devices.

    Without `share` it takes `least` bytes; with it, that share of the device, and cannot start where that is less
    than `least`. A soft share shrinks to what other programs leave. An instance that `measures` derives its cache
    from the free memory it finds, so no other may start on its devices meanwhile.
    """

    kind: DeviceKind
    least: int
    count: int = 1
    share: float | None = None
    is_share_soft: bool = False
    measures: bool = False
    #: The driver's numbers of the GPUs it may use; None: all.
    only: tuple[int, ...] | None = None
    #: What `least` is made of, for messages.
    note: str = ""


@dataclass(frozen=True)
class Asleep:
    """What a sleeping instance still takes: bytes of each device, and of RAM where it keeps its weights (level 1)."""

    device_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Seat:
    """Part of a device given to an instance, in bytes. `index` is the driver's number of a GPU."""

    device: str
    taken: int
    total: int
    index: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where an instance goes. `is_shared`: another of our instances has memory on one of the devices."""

    seats: tuple[Seat, ...]
    is_shared: bool = False

    @property
    def share(self) -> float:
        """The share of memory that holds on every device."""
        return min(seat.taken / seat.total for seat in self.seats)


#: Of what takes no memory here.
NOWHERE = Placement(())


@dataclass(frozen=True)
class ModelFacts:
    """What the model's own files tell, read without loading it. None: not known; no `need`: it takes no memory here.

    `tasks` is what one process does, `twin_tasks` what a second one of the same weights does if started to embed.
    """

    context_length: int | None = None
    vision: bool | None = None
    tasks: tuple[Task, ...] | None = None
    twin_tasks: tuple[Task, ...] = ()
    need: Need | None = None
    #: Set when an instance can sleep.
    asleep: Asleep | None = None
    chat_template: bool | None = None
    #: Requests that an instance works on at a time; None: any number.
    places: int | None = None


@dataclass(frozen=True)
class Warmup:
    """The request that an instance must answer before it counts as ready, so that no client pays for the first one."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LaunchPlan:
    """A process to start, or none (`argv` empty) for an engine that already runs elsewhere.

    `env` is added to a cleaned environment of the manager; `argv` holds no secret, because everybody can read it.
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
    """One adapter; stateless, built once by the manager with the whole configuration."""

    name: EngineName
    #: Phases of a start, in order, each with a pattern of the log line that ends it.
    phase_marks: Sequence[tuple[str, str]]

    def inspect(self, model: ModelConfig) -> ModelFacts:
        """Read the model's files. Raises `ModelProblem` when they are missing, broken or unsupported."""

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        """What to start so that `name` is served on the unix socket `socket`. Without `placement`, where it likes."""

    async def wait_ready(self, plan: LaunchPlan) -> None:
        """Wait until the instance answers, then warm it up. Raises nothing but `CancelledError` and `ModelProblem`."""

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        """The engine's real reason from the end of its output, in one or two sentences without paths."""


class EngineFactory(Protocol):
    def __call__(self, config: Config) -> Engine: ...
