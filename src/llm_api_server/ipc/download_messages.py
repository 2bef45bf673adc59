"""Models that come and go: what is asked of the manager, and its answers. A part of `control.py`."""

from __future__ import annotations

import msgspec

from llm_api_server.ipc.download_status import PullStatus


class PullModel(msgspec.Struct, tag="pull_model"):
    """Download a model, and `add` it to the configuration as `name`. Answered by `Pulls` with that one."""

    request: int
    source: str
    revision: str | None = None
    file: str | None = None
    name: str | None = None
    add: bool = True


class ListPulls(msgspec.Struct, tag="list_pulls"):
    """Answered by `Pulls`."""

    request: int


class CancelPull(msgspec.Struct, tag="cancel_pull"):
    """End a download, or forget one that is over. Answered by `Pulls` with that one."""

    request: int
    pull: str


class AddPulled(msgspec.Struct, tag="add_pulled"):
    """Put what has come into the configuration. Answered by `Pulls` with that one."""

    request: int
    pull: str
    name: str | None = None


class RemoveModel(msgspec.Struct, tag="remove_model"):
    """Take a model out of the configuration and delete its own files. Answered by `Removed` or `Refused`."""

    request: int
    model: str
    keep_files: bool = False


Pull = PullModel | ListPulls | CancelPull | AddPulled | RemoveModel


class Pulls(msgspec.Struct, tag="pulls"):
    request: int
    pulls: list[PullStatus]


class Removed(msgspec.Struct, tag="removed"):
    """The files and folders that were deleted."""

    request: int
    files: list[str]
