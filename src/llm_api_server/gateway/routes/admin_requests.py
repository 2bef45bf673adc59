"""`/admin/api/requests/live`: the requests in progress on all workers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from msgspec import Meta

from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.ipc import messages
from llm_api_server.ipc.usage_events import OpenRequest

State = Literal["waiting", "reading", "answering"]


class LiveRequest(msgspec.Struct):
    """One request in progress, at most half a second old.

    `started_at` is in Unix seconds; `queued` and `first_token` are seconds since then.
    """

    request_id: str
    started_at: float
    key_name: str
    key_id: str
    model: str
    endpoint: str
    stream: bool
    state: Annotated[
        State,
        Meta(description="waiting: queued, perhaps for a load; reading: in prefill; answering: generating tokens."),
    ]
    position: Annotated[
        int | None, Meta(description="Position in the queue of its model, from 1; null: not queued, or not known yet.")
    ]
    queued: float | None
    first_token: float | None
    prompt_tokens: Annotated[int, Meta(description="Estimated from the length until the engine reports it.")]
    completion_tokens: Annotated[int, Meta(description="Generated so far.")]


class LiveRequestList(msgspec.Struct):
    data: list[LiveRequest]
    total: int


def live_request_routes(link: ManagerLink) -> APIRouter:
    router = admin_router()

    @router.get("/requests/live", summary="List the requests in progress, the oldest first")
    async def live(limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> LiveRequestList:
        response = await link.call(messages.ListRequests(link.next_number(), limit))
        assert isinstance(response, messages.Requests), "the manager's response to this message"
        return LiveRequestList([_live(request) for request in response.requests], response.total)

    return router


def _live(request: OpenRequest) -> LiveRequest:
    started: State = "waiting" if request.queued is None else "reading"
    return LiveRequest(
        request_id=request.request_id,
        started_at=request.at,
        key_name=request.key_name,
        key_id=request.key_id,
        model=request.model,
        endpoint=request.endpoint,
        stream=request.stream,
        state=started if request.first_token is None else "answering",
        position=request.position,
        queued=request.queued,
        first_token=request.first_token,
        prompt_tokens=request.usage.prompt_tokens,
        completion_tokens=request.usage.completion_tokens,
    )
