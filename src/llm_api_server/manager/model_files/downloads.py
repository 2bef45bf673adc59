"""Downloads that administrators ask for: each is a `models pull` of its own, which tells how far it is.

Who is killed with one under way leaves what has come; the same download goes on with it.
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
from llm_api_server.ipc.download_messages import AddPulled, PullModel, Pulls, RemoveModel
from llm_api_server.ipc.download_status import PullStatus
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.model_files.removal import remove

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

#: Ended ones that are remembered.
_MOST_ENDED = 20
_MOST_RUNNING = 4
#: A line of the child is an event; a model of very many files makes a long one.
_LONGEST_LINE = 1 << 20


class Downloads:
    """`follow` has the server follow the file, and answers what is against it."""

    def __init__(self, config: Path, follow: Callable[[], Awaitable[str | None]]) -> None:
        self._config = config
        self._follow = follow
        self._pulls: dict[str, _Pull] = {}

    def statuses(self) -> list[PullStatus]:
        """The latest last."""
        return [pull.status for pull in self._pulls.values()]

    def start(self, client: WorkerSession, wanted: PullModel) -> None:
        running = [pull.status.source for pull in self._pulls.values() if pull.status.state == "running"]
        if len(running) >= _MOST_RUNNING:
            client.send(Refused(wanted.request, "slow_down", f"{len(running)} downloads are under way: wait for one."))
            return
        pull = _Pull(wanted)
        self._pulls[pull.status.id] = pull
        pull.task = asyncio.create_task(self._run(pull, wanted))
        self._forget_old()
        client.send(Pulls(wanted.request, [pull.status]))

    def cancel(self, client: WorkerSession, request: int, pull_id: str) -> None:
        """One that has ended is forgotten."""
        pull = self._pulls.get(pull_id)
        if pull is None:
            client.send(_unknown(request, pull_id))
            return
        if pull.status.state == "running":
            pull.status.state = "cancelled"
            pull.kill()
        else:
            del self._pulls[pull_id]
        client.send(Pulls(request, [pull.status]))

    async def add(self, client: WorkerSession, command: AddPulled) -> None:
        pull = self._pulls.get(command.pull)
        if pull is None or pull.status.entry is None:
            client.send(_unknown(command.request, command.pull))
            return
        problem = await self._add(pull.status, command.name)
        if problem is None:
            client.send(Pulls(command.request, [pull.status]))
        else:
            client.send(Refused(command.request, "invalid_configuration", problem))

    async def remove(self, client: WorkerSession, command: RemoveModel, statuses: Sequence[ModelStatus]) -> None:
        """The other way: it goes out of the file, and its own files go. `statuses` are those of all models."""
        await remove(client, command, self._config, statuses, self._follow)

    async def close(self) -> None:
        """End what is under way; what has come of it stays."""
        tasks = [pull.task for pull in self._pulls.values() if pull.task is not None]
        for pull in self._pulls.values():
            pull.kill()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, pull: _Pull, wanted: PullModel) -> None:
        status = pull.status
        logger.info("download of {} begins", status.source)
        try:
            message = await pull.run(self._config)
        except OSError as error:
            message = f"The download cannot be started: {error.strerror}."
        except (msgspec.DecodeError, LookupError, TypeError):
            logger.opt(exception=True).error("download of {}: what it tells is not understood", status.source)
            pull.kill()
            message = "The download tells what the server does not understand: the installation may be mixed up."
        if status.state == "cancelled":
            logger.info("download of {} cancelled", status.source)
            return
        if message is None and wanted.add:
            message = await self._add(status, wanted.name)
        status.speed = status.left = None
        status.state, status.error = ("failed", message) if message is not None else ("done", None)
        logger.info("download of {}: {}", status.source, message or "done")

    async def _add(self, status: PullStatus, name: str | None) -> str | None:
        """Put it into the file and have all follow; what is against it."""
        model, entry = name or status.model, status.entry
        if model is None or entry is None:
            return "The download did not tell what has come."
        try:
            await asyncio.to_thread(edit, self._config, lambda text: with_model(text, model, entry))
        except DownloadError as error:
            return str(error)
        status.model, status.added = model, True
        return await self._follow()

    def _forget_old(self) -> None:
        ended = [pull_id for pull_id, pull in self._pulls.items() if pull.status.state != "running"]
        for pull_id in ended[:-_MOST_ENDED]:
            del self._pulls[pull_id]


class _Pull:
    """One process, and what it has told."""

    def __init__(self, wanted: PullModel) -> None:
        self._wanted = wanted
        self._process: asyncio.subprocess.Process | None = None
        self._error: str | None = None
        self.status = PullStatus(uuid4().hex[:12], wanted.source, "running", time.time())
        self.task: asyncio.Task[None] | None = None

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def run(self, config: Path) -> str | None:
        """Until it is over; answers what went wrong. Raises `OSError`."""
        process = self._process = await asyncio.create_subprocess_exec(
            *_command(config, self._wanted),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
        )
        assert process.stdout is not None, "it is a pipe"
        assert process.stderr is not None, "it is a pipe"
        if self.status.state != "running":  # cancelled meanwhile
            self.kill()
        errors = asyncio.create_task(process.stderr.read())
        async for line in process.stdout:
            self._note(msgspec.json.decode(line))
        said = (await errors).decode("utf-8", "replace").strip()
        if await process.wait() == 0 and self.status.entry is not None:
            return None
        if self._error is not None:
            return self._error
        return said.splitlines()[-1] if said else "The download ended without a word."

    def _note(self, event: dict[str, Any]) -> None:
        """The fields that events and the status have in common, by their names; the last may be an error."""
        if "error" in event:
            self._error = event["error"]["message"]
            return
        for name, value in event.items():
            if name in _TOLD:
                setattr(self.status, name, value)
        if event["type"] == "planned":
            self.status.bytes = event["here"]


_TOLD = {"revision", "files", "note", "bytes", "total", "file", "speed", "left", "model", "entry"}


def _command(config: Path, wanted: PullModel) -> list[str]:
    options = [("--config", str(config)), ("--revision", wanted.revision), ("--file", wanted.file)]
    words = [word for name, value in options if value for word in (name, value)]
    return [sys.executable, "-m", "llm_api_server", "models", "pull", "--json", "--no-add", *words, "--", wanted.source]


def _unknown(request: int, pull_id: str) -> Refused:
    return Refused(request, "pull_not_found", f"There is no download {pull_id!r} that this could be done with.")
