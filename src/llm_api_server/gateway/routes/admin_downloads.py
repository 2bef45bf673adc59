"""`/admin/api/models/pull`, `/admin/api/pulls`: models are downloaded, added, and removed. Needs `admin`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server.downloads.source import parse_source
from llm_api_server.errors import ApiError, DownloadError, DownloadNotFound, InvalidRequest
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_models import require_admin
from llm_api_server.ipc import download_messages
from llm_api_server.ipc.download_status import PullState, PullStatus

#: Seconds between two looks for a stream of events.
_INTERVAL = 0.5
_NAME = Field(None, min_length=1, max_length=200, description="In the configuration; default: by the source.")


Add = Annotated[bool, Field(description="Put it into the configuration when it is there.")]


class PullRequest(BaseModel):
    """`source`: org/name of Hugging Face, ms:org/name of ModelScope, a URL of a .gguf file, or starter."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: str = Field(max_length=2000)
    revision: str | None = Field(None, min_length=1, max_length=200)
    file: str | None = Field(None, min_length=1, max_length=500, description="A quantization, a file, or a pattern.")
    name: str | None = _NAME
    add: Add = True


class AddRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = _NAME


class AdminPull(BaseModel):
    """One download. `bytes` of `total` are here; `speed` in bytes per second, `left` in seconds."""

    id: str
    source: str
    state: PullState
    started_at: float
    revision: str | None
    files: dict[str, int]
    note: str
    bytes: int
    total: int
    file: str
    speed: float | None
    left: float | None
    error: str | None
    model: str | None
    entry: dict[str, Any] | None = Field(description="Of the configuration, when it is done.")
    added: bool


class AdminPullList(BaseModel):
    data: list[AdminPull]


class _Asking:
    """What is asked of the manager."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def pull(self, wanted: PullRequest) -> PullStatus:
        try:
            source = parse_source(wanted.source, wanted.revision, wanted.file)
        except DownloadError as error:
            raise InvalidRequest(str(error), param="source") from error
        number = self._link.next_number()
        return await self._one(
            download_messages.PullModel(number, source.text, source.revision, source.file, wanted.name, wanted.add)
        )

    async def all(self) -> list[PullStatus]:
        return await self._ask(download_messages.ListPulls(self._link.next_number()), repeats=True)

    async def find(self, pull_id: str) -> PullStatus:
        for one in await self.all():
            if one.id == pull_id:
                return one
        raise DownloadNotFound(f"There is no download '{pull_id}'.", param="pull_id")

    async def add(self, pull_id: str, name: str | None) -> PullStatus:
        return await self._one(download_messages.AddPulled(self._link.next_number(), pull_id, name))

    async def cancel(self, pull_id: str) -> PullStatus:
        return await self._one(download_messages.CancelPull(self._link.next_number(), pull_id))

    async def events(self, pull_id: str) -> AsyncIterator[bytes]:
        """Each change, until it is over, forgotten, or the manager is gone."""
        told: PullStatus | None = None
        with contextlib.suppress(ApiError):
            while told is None or told.state == "running":
                status = await self.find(pull_id)
                if status != told:
                    yield b"data: %b\n\n" % msgspec.json.encode(status)
                told = status
                await asyncio.sleep(_INTERVAL)

    async def _one(self, message: Any) -> PullStatus:
        (one,) = await self._ask(message)
        return one

    async def _ask(self, message: Any, *, repeats: bool = False) -> list[PullStatus]:
        answer = await self._link.call(message, repeats=repeats)
        assert isinstance(answer, download_messages.Pulls), "what the manager answers to that"
        return answer.pulls


class RemovedModel(BaseModel):
    """`files`: what was deleted."""

    id: str
    deleted: Literal[True] = True
    files: list[str]


KeepFiles = Annotated[bool, Query(description="Only take it out of the configuration.")]


def pull_routes(link: ManagerLink) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])
    asking = _Asking(link)

    @router.post("/models/pull", status_code=202, summary="Download a model, and add it")
    async def pull(wanted: PullRequest) -> AdminPull:
        return _shown(await asking.pull(wanted))

    @router.delete("/models/{model_id:name}", summary="Take a model out of the configuration, and delete its files")
    async def remove(model_id: str, *, keep_files: KeepFiles = False) -> RemovedModel:
        answer = await link.call(download_messages.RemoveModel(link.next_number(), model_id, keep_files), repeats=False)
        assert isinstance(answer, download_messages.Removed), "what the manager answers to that"
        return RemovedModel(id=model_id, files=answer.files)

    @router.get("/pulls", summary="Downloads under way, and the last that ended")
    async def list_pulls() -> AdminPullList:
        return AdminPullList(data=[_shown(one) for one in await asking.all()])

    @router.get("/pulls/{pull_id}/events", summary="How far it is, as server-sent events", response_class=_Events)
    async def events(pull_id: str) -> StreamingResponse:
        await asking.find(pull_id)
        return _Events(asking.events(pull_id))

    @router.post("/pulls/{pull_id}/add", summary="Put what has come into the configuration")
    async def add(pull_id: str, wanted: AddRequest | None = None) -> AdminPull:
        return _shown(await asking.add(pull_id, wanted.name if wanted is not None else None))

    @router.delete("/pulls/{pull_id}", summary="Cancel it, or forget one that is over; what has come stays")
    async def cancel(pull_id: str) -> AdminPull:
        return _shown(await asking.cancel(pull_id))

    @router.get("/pulls/{pull_id}", summary="One download")
    async def get_pull(pull_id: str) -> AdminPull:
        return _shown(await asking.find(pull_id))

    return router


class _Events(StreamingResponse):
    media_type = "text/event-stream"


def _shown(status: PullStatus) -> AdminPull:
    return AdminPull(**msgspec.to_builtins(status))
