"""Status of a download, as the manager publishes it to workers and clients of the admin API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

DownloadState = Literal["running", "done", "failed", "cancelled"]


class DownloadStatus(msgspec.Struct):
    """Status of a download. `speed` is in bytes per second, `left` in seconds, `started_at` in Unix seconds.

    `bytes` of `total` have arrived. `added`: the configuration has the entry `model`.
    """

    id: str
    source: str
    state: DownloadState
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
    entry: Annotated[
        dict[str, Any] | None, Meta(description="Configuration entry of the model, once the download is done.")
    ] = None
    added: bool = False
