"""Downloads for the admin API: each is a `models pull` process that reports its progress. On the manager's loop.

A download that is killed keeps its files; the same download resumes from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
from loguru import logger

from llm_api_server.downloads.config_edit import edit, with_model
from llm_api_server.errors import DownloadError
from llm_api_server.ipc.download_messages import AddDownloaded, DownloadStatuses, RemoveModel, StartDownload
from llm_api_server.ipc.download_status import DownloadStatus
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.model_files.removal import remove

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

#: Ended downloads that are remembered.
_MAX_ENDED = 20
_MAX_RUNNING = 4
#: Bytes of one event of the process: the event of a model with many files is long.
_MAX_LINE = 1 << 20
#: Fields that the events and the status share.
_SHARED_FIELDS = {"revision", "files", "note", "bytes", "total", "file", "speed", "left", "model", "entry"}


class Downloads:
    """Running and ended downloads. `follow` reloads the configuration file and returns what prevents it, or None."""

    def __init__(self, config: Path, follow: Callable[[], Awaitable[str | None]]) -> None:
        self._config = config
        self._follow = follow
        self._downloads: dict[str, _Download] = {}

    def statuses(self) -> list[DownloadStatus]:
        """Return the downloads, the latest last."""
        return [download.status for download in self._downloads.values()]

    def start(self, client: WorkerSession, wanted: StartDownload) -> None:
        running = sum(download.status.state == "running" for download in self._downloads.values())
        if running >= _MAX_RUNNING:
            client.send(Refused(wanted.request, "slow_down", f"{running} downloads are running: wait for one."))
            return
        download = _Download(wanted)
        self._downloads[download.status.id] = download
        download.task = asyncio.create_task(self._run(download, wanted))
        self._forget_old()
        client.send(DownloadStatuses(wanted.request, [download.status]))

    def cancel(self, client: WorkerSession, request: int, download_id: str) -> None:
        """Cancel a download, or forget one that has ended."""
        download = self._downloads.get(download_id)
        if download is None:
            client.send(_unknown(request, download_id))
            return
        if download.status.state == "running":
            download.status.state = "cancelled"
            download.kill()
        else:
            del self._downloads[download_id]
        client.send(DownloadStatuses(request, [download.status]))

    async def add(self, client: WorkerSession, command: AddDownloaded) -> None:
        download = self._downloads.get(command.download)
        if download is None or download.status.entry is None:
            client.send(_unknown(command.request, command.download))
            return
        problem = await self._add(download.status, command.name)
        if problem is None:
            client.send(DownloadStatuses(command.request, [download.status]))
        else:
            client.send(Refused(command.request, "invalid_configuration", problem))

    async def remove(self, client: WorkerSession, command: RemoveModel, statuses: Sequence[ModelStatus]) -> None:
        """Remove a model from the configuration and delete its own files. `statuses` are those of all models."""
        await remove(client, command, self._config, statuses, self._follow)

    async def close(self) -> None:
        """End the running downloads; their files stay."""
        tasks = [download.task for download in self._downloads.values() if download.task is not None]
        for download in self._downloads.values():
            download.kill()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, download: _Download, wanted: StartDownload) -> None:
        status = download.status
        logger.info("download of {} started", status.source)
        try:
            message = await download.run(self._config)
        except OSError as error:
            message = f"The download cannot be started: {error.strerror}."
        except (msgspec.DecodeError, LookupError, TypeError):
            logger.opt(exception=True).error("download of {}: an event cannot be decoded", status.source)
            download.kill()
            message = "The server cannot decode the progress of the download: two versions may be installed."
        if status.state == "cancelled":
            logger.info("download of {} cancelled", status.source)
            return
        if message is None and wanted.add:
            message = await self._add(status, wanted.name)
        status.speed = status.left = None
        status.state, status.error = ("failed", message) if message is not None else ("done", None)
        logger.info("download of {}: {}", status.source, message or "done")

    async def _add(self, status: DownloadStatus, name: str | None) -> str | None:
        """Add the model to the configuration file and reload it; return what prevents it, or None."""
        model, entry = name or status.model, status.entry
        if model is None or entry is None:
            return "The download reported no model."
        try:
            await asyncio.to_thread(edit, self._config, lambda text: with_model(text, model, entry))
        except DownloadError as error:
            return str(error)
        status.model, status.added = model, True
        return await self._follow()

    def _forget_old(self) -> None:
        ended = [download_id for download_id, download in self._downloads.items() if download.status.state != "running"]
        for download_id in ended[:-_MAX_ENDED]:
            del self._downloads[download_id]


class _Download:
    """One download process and its status."""

    def __init__(self, wanted: StartDownload) -> None:
        self._wanted = wanted
        self._process: asyncio.subprocess.Process | None = None
        self._error: str | None = None
        self.status = DownloadStatus(uuid4().hex[:12], wanted.source, "running", time.time())
        self.task: asyncio.Task[None] | None = None

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def run(self, config: Path) -> str | None:
        """Run the process to its end; return what went wrong, or None. Raises `OSError`."""
        process = self._process = await asyncio.create_subprocess_exec(
            *_command(config, self._wanted),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
        )
        assert process.stdout is not None, "it is a pipe"
        assert process.stderr is not None, "it is a pipe"
        if self.status.state != "running":  # cancelled meanwhile
            self.kill()
        errors = asyncio.create_task(process.stderr.read())
        async for line in process.stdout:
            self._apply(msgspec.json.decode(line))
        stderr = (await errors).decode("utf-8", "replace").strip()
        if await process.wait() == 0 and self.status.entry is not None:
            return None
        if self._error is not None:
            return self._error
        return stderr.splitlines()[-1] if stderr else "The download ended without an error message."

    def _apply(self, event: dict[str, Any]) -> None:
        """Copy the shared fields of an event to the status; the last event may be an error."""
        if "error" in event:
            self._error = event["error"]["message"]
            return
        for name, value in event.items():
            if name in _SHARED_FIELDS:
                setattr(self.status, name, value)
        if event["type"] == "planned":
            self.status.bytes = event["here"]


def _command(config: Path, wanted: StartDownload) -> list[str]:
    options = [("--config", str(config)), ("--revision", wanted.revision), ("--file", wanted.file)]
    words = [word for name, value in options if value for word in (name, value)]
    return [sys.executable, "-m", "llm_api_server", "models", "pull", "--json", "--no-add", *words, "--", wanted.source]


def _unknown(request: int, download_id: str) -> Refused:
    return Refused(request, "pull_not_found", f"There is no such download: {download_id!r}.")
