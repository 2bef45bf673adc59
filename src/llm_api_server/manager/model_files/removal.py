"""Removes a model from the configuration and deletes its files, for the admin API; the same as `models rm`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from llm_api_server.config.load import load_config
from llm_api_server.config.models import ModelsConfig
from llm_api_server.downloads.config_edit import edit, without_model
from llm_api_server.downloads.files import delete, files_of, why_needed
from llm_api_server.errors import ConfigError, DownloadError
from llm_api_server.ipc.download_messages import Removed, RemoveModel
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState

if TYPE_CHECKING:
    from llm_api_server.manager.worker_session import WorkerSession

_NOT_REMOVABLE = "model_not_removable"
_GONE = {ModelState.STOPPED, ModelState.FAILED}


async def remove(
    client: WorkerSession,
    command: RemoveModel,
    file: Path,
    statuses: Sequence[ModelStatus],
    follow: Callable[[], Awaitable[str | None]],
) -> None:
    """Remove the model of `command` from the configuration `file`. `follow` reloads it and returns what prevents it."""
    name, request = command.model, command.request
    try:
        config = await asyncio.to_thread(load_config, file)
    except ConfigError as error:
        client.send(Refused(request, "invalid_configuration", str(error)))
        return
    if name not in config.models.available:
        client.send(Refused(request, "model_not_found", f"The configuration file has no model {name!r}."))
        return
    files = [] if command.keep_files else files_of(config.models.available, config.models_dir, name)
    problem = _problem(config.models, command, statuses, files)
    if problem is not None:
        client.send(Refused(request, _NOT_REMOVABLE, problem))
        return
    try:
        await asyncio.to_thread(edit, file, lambda text: without_model(text, name))
    except DownloadError as error:
        client.send(Refused(request, _NOT_REMOVABLE, str(error)))
        return
    problem = await follow()
    if problem is None:
        problem = await asyncio.to_thread(_delete, files)
    if problem is not None:
        client.send(Refused(request, "invalid_configuration", problem))
        return
    logger.info("model {} removed, with {} files and folders", name, len(files))
    client.send(Removed(request, [str(path) for path in files]))


def _problem(
    models: ModelsConfig, command: RemoveModel, statuses: Sequence[ModelStatus], files: Sequence[Path]
) -> str | None:
    name = command.model
    if (needed := why_needed(models, name)) is not None:
        return needed
    if any(status.state not in _GONE for status in statuses if name in {status.id, status.twin_of}):
        return f"The model {name!r} is loaded: unload it first."
    if not files and not command.keep_files:
        return (
            f"The model {name!r} has no files of its own under models_dir, so there is nothing to delete: use "
            "keep_files=true to remove only its entry from the configuration."
        )
    return None


def _delete(files: Sequence[Path]) -> str | None:
    try:
        delete(files)
    except OSError as error:
        return f"The model is removed from the configuration, but {error.filename} cannot be deleted: {error.strerror}."
    return None
