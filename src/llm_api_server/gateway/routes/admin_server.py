"""`/admin/api/status`, `/config`, `/reload`, `/logs`: processes, devices, the configuration in use, and log files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from msgspec import Meta

from llm_api_server import __version__
from llm_api_server.config.change import Change
from llm_api_server.config.models import Config
from llm_api_server.config.redacted_view import redacted
from llm_api_server.errors import LogNotFound
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.ipc import messages
from llm_api_server.ipc.model_status import DeviceStatus
from llm_api_server.lifecycle.config_handover import unpack

#: Bytes at the end of a log file that are searched for its last lines.
_TAIL_BYTES = 1 << 20
_MAX_LINES = 5000


class ServerStatus(msgspec.Struct):
    """Process ids of the manager and the workers, and the devices that models share."""

    version: str
    manager: int
    workers: list[int]
    devices: list[DeviceStatus]


class ShownConfig(msgspec.Struct):
    file: str
    options: Annotated[
        dict[str, Any], Meta(description="Every option with its value, defaults included; secrets are hidden.")
    ]


class ReloadReport(msgspec.Struct):
    """Changes that were made; with `applied: false`, changes that a reload would make."""

    applied: bool
    late_workers: Annotated[int, Meta(description="Number of API workers that did not apply the changes in time.")]
    changes: list[Change]


class Log(msgspec.Struct):
    """One log file. `name`: gateway, manager, or engines/MODEL. `modified_at` in Unix seconds."""

    name: str
    bytes: int
    modified_at: float


class LogList(msgspec.Struct):
    data: list[Log]


Lines = Annotated[int, Query(ge=1, le=_MAX_LINES, description="Number of lines from the end.")]


def server_routes(link: ManagerLink) -> APIRouter:
    router = admin_router()

    @router.get("/status", summary="Show processes and devices")
    async def status() -> ServerStatus:
        response = await link.call(messages.GetStatus(link.next_number()))
        assert isinstance(response, messages.Status), "the manager's response to this message"
        return ServerStatus(__version__, response.manager, response.workers, response.devices)

    @router.get("/config", summary="Show the configuration in use, without secrets")
    async def config() -> ShownConfig:
        current = await _current_config(link)
        return ShownConfig(file=str(current.source), options=redacted(current))

    @router.post("/reload", summary="Apply the configuration file as it is now")
    async def reload(*, dry_run: bool = False) -> ReloadReport:
        response = await link.call(messages.ReloadConfig(link.next_number(), dry_run), repeats=False)
        assert isinstance(response, messages.Reloaded), "the manager's response to this message"
        return ReloadReport(response.applied, response.late, response.changes)

    @router.get("/logs", summary="List the log files")
    async def list_logs() -> LogList:
        folder = (await _current_config(link)).log_dir
        return LogList(await asyncio.to_thread(_logs, folder))

    @router.get("/logs/{name:name}", summary="Read the last lines of a log file", response_class=PlainTextResponse)
    async def read_log(name: str, lines: Lines = 200) -> PlainTextResponse:
        folder = (await _current_config(link)).log_dir
        if name not in {log.name for log in await asyncio.to_thread(_logs, folder)}:
            raise LogNotFound(f"There is no log '{name}'; /admin/api/logs lists them.", param="name")
        return PlainTextResponse(await asyncio.to_thread(_tail, folder / f"{name}.log", lines))

    return router


async def _current_config(link: ManagerLink) -> Config:
    response = await link.call(messages.GetConfig(link.next_number()))
    assert isinstance(response, messages.CurrentConfig), "the manager's response to this message"
    return unpack(response.config.encode())


def _logs(folder: Path) -> list[Log]:
    found = []
    for path in (*sorted(folder.glob("*.log")), *sorted(folder.glob("engines/*.log"))):
        status = path.stat()
        name = str(path.relative_to(folder).with_suffix(""))
        found.append(Log(name, status.st_size, status.st_mtime))
    return found


def _tail(path: Path, lines: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:]) + "\n"
