"""Status of models and devices, as the manager publishes it to workers, clients of the admin API and the CLI."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llm_api_server.types import INTERNAL, EngineName, ModelState, Task


class ModelStatus(msgspec.Struct):
    """Status of a configured model. Times are Unix seconds.

    `in_flight` counts requests inside the engine, `queued` those that wait for it. An embedding instance has
    `twin_of` and is listed only while it is not stopped.
    """

    id: str
    state: ModelState
    engine: EngineName
    path: str
    aliases: list[str] = []
    adapters: list[str] = []
    context_length: int | None = None
    vision: bool | None = None
    tasks: Annotated[
        tuple[Task, ...] | None, Meta(description="Supported tasks, those of its embedding instance included.")
    ] = None
    twin_of: Annotated[str | None, Meta(description="The model whose embedding instance this is.")] = None
    chat_template: Annotated[bool | None, INTERNAL] = None
    error: str | None = None
    retry_at: float | None = None
    #: Expected end of a load under way, estimated from earlier loads.
    ready_at: Annotated[float | None, INTERNAL] = None
    instance: str | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    in_flight: int = 0
    queued: int = 0
    preloaded: bool = False
    pinned: Annotated[bool, Meta(description="Loaded until it is unpinned or unloaded.")] = False
    last_used: float | None = None
    loaded_at: float | None = None
    load_seconds: float | None = None
    progress_at: Annotated[float | None, Meta(description="Last engine step seen while it had requests.")] = None
    devices: Annotated[dict[str, int], Meta(description="Bytes reserved on each device.")] = {}
    phase: Annotated[str | None, Meta(description="Current phase of a load under way.")] = None
    phases: Annotated[dict[str, float], Meta(description="Seconds of each phase of the load that is over.")] = {}


class DeviceStatus(msgspec.Struct):
    """Memory of a GPU or of the machine, in bytes. `taken`: reserved, by model; `foreign`: used by other programs."""

    id: str
    name: str
    total: int
    limit: int
    foreign: int
    taken: dict[str, int]
    free: int


Verdict = Literal["loaded", "fits", "after_waiting", "after_evicting", "not_now", "never"]


class Explanation(msgspec.Struct):
    """Verdict on loading a model now. `takes`: bytes it would reserve on each device; `needs`: the same in words."""

    model: str
    verdict: Verdict
    message: str
    evict: list[str]
    needs: str | None
    takes: dict[str, int]
    places: int
    places_free: int
    devices: list[DeviceStatus]
