"""`/admin/api/models/pull`, `/admin/api/pulls`: downloads of models; adding and removing models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from llm_api_server.downloads.source import parse_source
from llm_api_server.errors import ApiError, DownloadError, DownloadNotFound, InvalidRequest
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.ipc import download_messages
from llm_api_server.ipc.download_status import DownloadStatus

#: Seconds between two polls of the manager for an event stream.
_POLL_INTERVAL = 0.5
_NAME = Field(None, min_length=1, max_length=200, description="Name in the configuration; default: from the source.")


class DownloadRequest(BaseModel):
    """`source`: org/name of Hugging Face, ms:org/name of ModelScope, a URL of a .gguf file, or starter."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: str = Field(max_length=2000)
    revision: str | None = Field(None, min_length=1, max_length=200)
    file: str | None = Field(None, min_length=1, max_length=500, description="A quantization, a file, or a pattern.")
    name: str | None = _NAME
    add: Annotated[bool, Field(description="Add the model to the configuration after the download.")] = True


class AddRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = _NAME


class DownloadList(msgspec.Struct):
    data: list[DownloadStatus]


class RemovedModel(msgspec.Struct):
    """`files`: the deleted files."""

    id: str
    deleted: Literal[True]
    files: list[str]


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"


class _Downloads:
    """The manager's downloads. Methods raise `ApiError`."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def start(self, request: DownloadRequest) -> DownloadStatus:
        try:
            source = parse_source(request.source, request.revision, request.file)
        except DownloadError as error:
            raise InvalidRequest(str(error), param="source") from error
        number = self._link.next_number()
        return await self._call_for_one(
            download_messages.StartDownload(
                number, source.text, source.revision, source.file, request.name, request.add
            )
        )

    async def all(self) -> list[DownloadStatus]:
        return await self._call(download_messages.ListDownloads(self._link.next_number()), repeats=True)

    async def get(self, download_id: str) -> DownloadStatus:
        for download in await self.all():
            if download.id == download_id:
                return download
        message = f"There is no download '{download_id}'; /admin/api/pulls lists them."
        raise DownloadNotFound(message, param="pull_id")

    async def add(self, download_id: str, name: str | None) -> DownloadStatus:
        return await self._call_for_one(download_messages.AddDownloaded(self._link.next_number(), download_id, name))

    async def cancel(self, download_id: str) -> DownloadStatus:
        return await self._call_for_one(download_messages.CancelDownload(self._link.next_number(), download_id))

    async def events(self, download_id: str) -> AsyncIterator[bytes]:
        """Yield each change of the status, until the download ends or is forgotten, or the manager goes away."""
        sent: DownloadStatus | None = None
        with contextlib.suppress(ApiError):
            while sent is None or sent.state == "running":
                status = await self.get(download_id)
                if status != sent:
                    yield b"data: %b\n\n" % msgspec.json.encode(status)
                sent = status
                await asyncio.sleep(_POLL_INTERVAL)

    async def _call_for_one(self, message: Any) -> DownloadStatus:
        (status,) = await self._call(message, repeats=False)
        return status

    async def _call(self, message: Any, *, repeats: bool) -> list[DownloadStatus]:
        response = await self._link.call(message, repeats=repeats)
        assert isinstance(response, download_messages.DownloadStatuses), "the manager's response to these messages"
        return response.downloads


KeepFiles = Annotated[bool, Query(description="Remove the model from the configuration only; keep its files.")]


def download_routes(link: ManagerLink) -> APIRouter:
    router = admin_router()
    downloads = _Downloads(link)

    @router.post("/models/pull", status_code=202, summary="Download a model and add it to the configuration")
    async def pull(wanted: DownloadRequest) -> DownloadStatus:
        return await downloads.start(wanted)

    @router.delete("/models/{model_id:name}", summary="Remove a model from the configuration and delete its files")
    async def remove(model_id: str, *, keep_files: KeepFiles = False) -> RemovedModel:
        response = await link.call(
            download_messages.RemoveModel(link.next_number(), model_id, keep_files), repeats=False
        )
        assert isinstance(response, download_messages.Removed), "the manager's response to this message"
        return RemovedModel(model_id, deleted=True, files=response.files)

    @router.get("/pulls", summary="List running downloads and the last ended ones")
    async def list_pulls() -> DownloadList:
        return DownloadList(await downloads.all())

    @router.get(
        "/pulls/{pull_id}/events", summary="Stream the progress as server-sent events", response_class=_EventStream
    )
    async def events(pull_id: str) -> StreamingResponse:
        await downloads.get(pull_id)
        return _EventStream(downloads.events(pull_id))

    @router.post("/pulls/{pull_id}/add", summary="Add a downloaded model to the configuration")
    async def add(pull_id: str, wanted: AddRequest | None = None) -> DownloadStatus:
        return await downloads.add(pull_id, wanted.name if wanted is not None else None)

    @router.delete("/pulls/{pull_id}", summary="Cancel a download, or forget an ended one; its files stay")
    async def cancel(pull_id: str) -> DownloadStatus:
        return await downloads.cancel(pull_id)

    @router.get("/pulls/{pull_id}", summary="Show one download")
    async def get_pull(pull_id: str) -> DownloadStatus:
        return await downloads.get(pull_id)

    return router
