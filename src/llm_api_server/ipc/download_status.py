"""What is told of a download: by the manager to workers, by these to administrators."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

PullState = Literal["running", "done", "failed", "cancelled"]


class PullStatus(msgspec.Struct):
    """One download. `bytes` of `total` are here; `speed` in bytes per second; `left` and `started_at` in seconds.

    When it is done, `entry` is what the configuration gets for it under `model`, and `added` whether it has it.
    """

    id: str
    source: str
    state: PullState
    started_at: float
    revision: str | None = None
    files: dict[str, int] = {}
    note: str = ""
    bytes: int = 0
    total: int = 0
    file: str = ""
    speed: float | None = None
    left: float | None = None
    error: str | None = None
    model: str | None = None
    entry: dict[str, Any] | None = None
    added: bool = False
