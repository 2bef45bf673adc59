"""Messages about downloads and removals of models: commands to the manager, and its responses."""

from __future__ import annotations

import msgspec

from llm_api_server.ipc.download_status import DownloadStatus


class StartDownload(msgspec.Struct, tag="pull_model"):
    """Download a model, and `add` it to the configuration as `name`. Response: `DownloadStatuses` with this one."""

    request: int
    source: str
    revision: str | None = None
    file: str | None = None
    name: str | None = None
    add: bool = True


class ListDownloads(msgspec.Struct, tag="list_pulls"):
    """List all downloads. Response: `DownloadStatuses`."""

    request: int


class CancelDownload(msgspec.Struct, tag="cancel_pull", rename={"download": "pull"}):
    """Cancel a running download, or forget an ended one. Response: `DownloadStatuses` with this one."""

    request: int
    download: str


class AddDownloaded(msgspec.Struct, tag="add_pulled", rename={"download": "pull"}):
    """Add a downloaded model to the configuration. Response: `DownloadStatuses` with this one."""

    request: int
    download: str
    name: str | None = None


class RemoveModel(msgspec.Struct, tag="remove_model"):
    """Remove a model from the configuration and delete its own files. Response: `Removed` or `Refused`."""

    request: int
    model: str
    keep_files: bool = False


DownloadCommand = StartDownload | ListDownloads | CancelDownload | AddDownloaded | RemoveModel


class DownloadStatuses(msgspec.Struct, tag="pulls", rename={"downloads": "pulls"}):
    """Status of each download, the latest last."""

    request: int
    downloads: list[DownloadStatus]


class Removed(msgspec.Struct, tag="removed"):
    """Files and folders that were deleted."""

    request: int
    files: list[str]
