"""What is told of a model and of the devices: by the manager to workers, by these to administrators."""

from __future__ import annotations

from typing import Literal

import msgspec

from llm_api_server.types import EngineName, ModelState, Task


class ModelStatus(msgspec.Struct):
    """One configured model as the manager sees it; what `/v1/models`, the admin API and the command line show.

    Times are Unix seconds. `in_flight` counts requests inside the engine, `queued` those waiting for it. `tasks` is
    what it can be asked for, be it through its twin. A twin has `twin_of` and is listed only while it is not stopped.
    """

    id: str
    state: ModelState
    engine: EngineName
    path: str
    aliases: list[str] = []
    adapters: list[str] = []
    context_length: int | None = None
    vision: bool | None = None
    tasks: tuple[Task, ...] | None = None
    twin_of: str | None = None
    chat_template: bool | None = None
    error: str | None = None
    retry_at: float | None = None
    #: When a load that is under way is expected to be over, as far as earlier ones tell.
    ready_at: float | None = None
    instance: str | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    in_flight: int = 0
    queued: int = 0
    preloaded: bool = False
    #: It stays loaded until it is unpinned.
    pinned: bool = False
    last_used: float | None = None
    loaded_at: float | None = None
    load_seconds: float | None = None
    #: When it was last seen to make a step while it had requests.
    progress_at: float | None = None
    #: Bytes it takes of each device's memory in the books.
    devices: dict[str, int] = {}
    #: Of a load under way; and the seconds of each, in order, that are over.
    phase: str | None = None
    phases: dict[str, float] = {}


class DeviceStatus(msgspec.Struct):
    """Memory of a GPU or of the machine, in bytes. `taken`: by model, in the books; `foreign`: by other programs."""

    id: str
    name: str
    total: int
    limit: int
    foreign: int
    taken: dict[str, int]
    free: int


Verdict = Literal["loaded", "fits", "after_waiting", "after_evicting", "not_now", "never"]


class Explanation(msgspec.Struct):
    """Whether a model would fit. `takes`: bytes of each device it would be given; `needs`: that in words."""

    model: str
    verdict: Verdict
    message: str
    evict: list[str]
    needs: str | None
    takes: dict[str, int]
    places: int
    places_free: int
    devices: list[DeviceStatus]
