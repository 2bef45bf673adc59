"""`/admin/api/status`, `/config`, `/logs`: what runs here, by what configuration, what it says. Needs `admin`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from llm_api_server import __version__
from llm_api_server.config.models import Config
from llm_api_server.config.redacted_view import redacted
from llm_api_server.errors import LogNotFound
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_models import AdminDevice, require_admin
from llm_api_server.ipc import messages
from llm_api_server.lifecycle.config_handover import unpack

#: The end of a log that is read for its last lines.
_TAIL_BYTES = 1 << 20
_MOST_LINES = 5000


class RunningServer(BaseModel):
    """The processes by their pids, and the memory that models share."""

    version: str
    manager: int
    workers: list[int]
    devices: list[AdminDevice]


class ShownConfig(BaseModel):
    file: str
    options: dict[str, Any] = Field(description="Every option with the value that counts; secrets are hidden.")


class Log(BaseModel):
    """`name`: gateway, manager, or engines/MODEL. `modified_at` in Unix seconds."""

    name: str
    bytes: int
    modified_at: float


class LogList(BaseModel):
    data: list[Log]


Lines = Annotated[int, Query(ge=1, le=_MOST_LINES, description="How many of the last lines.")]


def server_routes(link: ManagerLink) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])

    async def followed() -> Config:
        answer = await link.call(messages.GetConfig(link.next_number()))
        assert isinstance(answer, messages.CurrentConfig), "what the manager answers to that"
        return unpack(answer.config.encode())

    @router.get("/status", summary="Processes and devices")
    async def status() -> RunningServer:
        answer = await link.call(messages.GetStatus(link.next_number()))
        assert isinstance(answer, messages.Status), "what the manager answers to that"
        devices = [AdminDevice(**msgspec.to_builtins(device)) for device in answer.devices]
        return RunningServer(version=__version__, manager=answer.manager, workers=answer.workers, devices=devices)

    @router.get("/config", summary="The configuration that is followed, without secrets")
    async def config() -> ShownConfig:
        current = await followed()
        return ShownConfig(file=str(current.source), options=redacted(current))

    @router.get("/logs", summary="The logs that there are")
    async def list_logs() -> LogList:
        return LogList(data=await asyncio.to_thread(_logs, (await followed()).log_dir))

    @router.get("/logs/{name:name}", summary="The last lines of a log", response_class=PlainTextResponse)
    async def read_log(name: str, lines: Lines = 200) -> PlainTextResponse:
        folder = (await followed()).log_dir
        if name not in {log.name for log in await asyncio.to_thread(_logs, folder)}:
            raise LogNotFound(f"There is no log '{name}'; /admin/api/logs lists them.", param="name")
        return PlainTextResponse(await asyncio.to_thread(_tail, folder / f"{name}.log", lines))

    return router


def _logs(folder: Path) -> list[Log]:
    found = []
    for path in (*sorted(folder.glob("*.log")), *sorted(folder.glob("engines/*.log"))):
        status = path.stat()
        name = str(path.relative_to(folder).with_suffix(""))
        found.append(Log(name=name, bytes=status.st_size, modified_at=status.st_mtime))
    return found


def _tail(path: Path, lines: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:]) + "\n"
