"""`/admin/api/requests/live`: the requests that run now, on all workers. Needs `admin`."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_models import require_admin
from llm_api_server.ipc import messages
from llm_api_server.ipc.usage_events import OpenRequest


class LiveRequest(BaseModel):
    """One that runs. `started_at` in Unix seconds; `queued`, `first_token` in seconds from then. Half a second old."""

    request_id: str
    started_at: float
    key_name: str
    key_id: str
    model: str
    endpoint: str
    stream: bool
    state: Literal["waiting", "reading", "answering"] = Field(
        description="waiting: for a load or its turn; reading: an engine has it; answering: its first token has come."
    )
    position: int | None = Field(description="In the queue of its model, from 1; of one that waits, once it is told.")
    queued: float | None
    first_token: float | None
    prompt_tokens: int = Field(description="By its length, until the engine tells.")
    completion_tokens: int = Field(description="So far.")


class LiveRequestList(BaseModel):
    data: list[LiveRequest]
    total: int


def live_request_routes(link: ManagerLink) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])

    @router.get("/requests/live", summary="Requests that run now, the oldest first")
    async def live(limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> LiveRequestList:
        answer = await link.call(messages.ListRequests(link.next_number(), limit))
        assert isinstance(answer, messages.Requests), "what the manager answers to that"
        return LiveRequestList(data=[_shown(one) for one in answer.requests], total=answer.total)

    return router


def _shown(one: OpenRequest) -> LiveRequest:
    state: Literal["waiting", "reading", "answering"] = "waiting" if one.queued is None else "reading"
    return LiveRequest(
        request_id=one.request_id,
        started_at=one.at,
        key_name=one.key_name,
        key_id=one.key_id,
        model=one.model,
        endpoint=one.endpoint,
        stream=one.stream,
        state="answering" if one.first_token is not None else state,
        position=one.position,
        queued=one.queued,
        first_token=one.first_token,
        prompt_tokens=one.usage.prompt_tokens,
        completion_tokens=one.usage.completion_tokens,
    )
