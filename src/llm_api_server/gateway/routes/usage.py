"""`/admin/api/usage`, `/admin/api/requests`: what all keys used; `/v1/usage`: what the caller's own key used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from llm_api_server.admin import usage_rows
from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.gateway.routes.store_access import NO_NUL, StoreAccess, Stored
from llm_api_server.times import parse_since
from llm_api_server.types import UsageGroup

if TYPE_CHECKING:
    from llm_api_server.admin.keys import PickedKey
    from llm_api_server.store.usage import UsageSum

_OWN_GROUPS: tuple[UsageGroup, ...] = ("model", "day", "hour")
_CSV = "text/csv"
_LARGEST = 2**53

Format = Annotated[
    Literal["json", "csv"] | None, Query(description="Default: what `Accept` asks for, `text/csv` or JSON.")
]
Model = Annotated[str | None, Query(pattern=NO_NUL, description="Only of this model.")]
OfKey = Annotated[str | None, Query(pattern=NO_NUL, description="Only of this key: its id or name.")]


class Sums(BaseModel):
    """`seconds` is the time of all requests together; `first_token` and `queued` are averages, in seconds."""

    requests: int
    errors: int
    aborted: int = Field(description="The client left before the end.")
    prompt_tokens: int
    cached_tokens: int = Field(description="Part of `prompt_tokens`.")
    completion_tokens: int
    reasoning_tokens: int = Field(description="Part of `completion_tokens`.")
    seconds: float
    first_token: float | None
    queued: float | None


class Group(Sums):
    """Has those of the first five fields that `group_by` asks for."""

    key_id: str | None = None
    key_name: str | None = None
    model: str | None = None
    day: str | None = Field(None, description="Such as 2027-01-31; UTC.")
    hour: str | None = Field(None, description="Such as 2027-01-31T12:00:00Z.")


class UsageReport(BaseModel):
    """What ended; requests that still run are not in it."""

    data: list[Group]
    total: Sums | None = Field(description="null: nothing was used.")


class RequestEntry(BaseModel):
    """One request. Times are Unix seconds; `queued`, `first_token` and `duration` seconds from its start."""

    id: int
    started_at: float
    ended_at: float | None = Field(description="null: it still runs.")
    key_name: str
    key_id: str
    model: str
    endpoint: str
    stream: bool
    status: int | None
    error: str | None = Field(description="`worker_lost`: the end is not known; tokens are those last told.")
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    queued: float | None
    first_token: float | None
    duration: float | None
    instance: str | None
    request_id: str
    prompt: str | None = Field(description="Only with `storage.record_prompts`.")


class RequestList(BaseModel):
    data: list[RequestEntry]


@dataclass(frozen=True)
class TimeRange:
    """The times that a query is about, in Unix seconds."""

    since: float | None
    until: float | None


def time_range(
    since: Annotated[str | None, Query(description="7d, 2027-01-31, 2027-01-31T12:00:00Z or Unix seconds.")] = None,
    until: Annotated[str | None, Query(description="As `since`; not part of it.")] = None,
) -> TimeRange:
    return TimeRange(_time("since", since), _time("until", until))


SpanDependency = Annotated[TimeRange, Depends(time_range)]
_ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {_CSV: {"schema": {"type": "string"}}}}}


def usage_routes(store: StoreAccess) -> APIRouter:
    """`/v1/usage`."""
    router = APIRouter(tags=["usage"])

    @router.get("/v1/usage", summary="What the key used", response_model=UsageReport, responses=_ANSWERS)
    async def own_usage(
        key: KeyDependency,
        request: Request,
        span: SpanDependency,
        group_by: Annotated[str, Query(description="One or several of model, day, hour; empty: one sum.")] = "model",
        model: Model = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        groups = _groups(group_by, _OWN_GROUPS)
        found = await store.call(_sums(groups, span, model, lambda _: {"key_id": key.key_id}))
        return _report(*found, groups, as_csv=_wants_csv(request, format))

    return router


def admin_usage_routes(store: StoreAccess) -> APIRouter:
    """`/admin/api/usage`, `/admin/api/requests`."""
    router = admin_router()

    @router.get("/usage", summary="What was used", response_model=UsageReport, responses=_ANSWERS)
    async def usage(
        request: Request,
        span: SpanDependency,
        group_by: Annotated[str, Query(description="One or several of key, model, day, hour; empty: one sum.")] = "key",
        key: OfKey = None,
        model: Model = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        groups = _groups(group_by, usage_rows.GROUPS)
        found = await store.call(_sums(groups, span, model, lambda stored: stored.managed.picked(key)))
        return _report(*found, groups, as_csv=_wants_csv(request, format))

    @router.get("/requests", summary="Single requests, newest first", response_model=RequestList, responses=_ANSWERS)
    async def requests(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        before: Annotated[int | None, Query(ge=0, le=_LARGEST, description="Only before the one with this id.")] = None,
        key: OfKey = None,
        model: Model = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        found = await store.call(
            lambda stored: stored.usage.rows(limit=limit, before=before, model=model, **stored.managed.picked(key))
        )
        if _wants_csv(request, format):
            return _csv(usage_rows.requests_csv(found), "requests.csv")
        return JSONResponse({"data": [usage_rows.request_row(one) for one in found]})

    return router


_Found = tuple[list["UsageSum"], list["UsageSum"]]


def _sums(
    groups: tuple[UsageGroup, ...], span: TimeRange, model: str | None, pick: Callable[[Stored], PickedKey]
) -> Callable[[Stored], _Found]:
    """Reads the groups, and the total."""

    def read(stored: Stored) -> _Found:
        from llm_api_server.store.usage import UsageQuery  # noqa: PLC0415 - SQLAlchemy is imported when it is needed

        wanted = UsageQuery(since=span.since, until=span.until, model=model, group_by=groups, **pick(stored))
        return stored.usage.query(wanted), stored.usage.query(msgspec.structs.replace(wanted, group_by=()))

    return read


def _report(
    found: Sequence[UsageSum], total: Sequence[UsageSum], groups: Sequence[UsageGroup], *, as_csv: bool
) -> Response:
    if as_csv:
        return _csv(usage_rows.sums_csv(found, groups), "usage.csv")
    columns = usage_rows.sum_columns(groups)
    return JSONResponse(
        {
            "data": [usage_rows.sum_row(one, columns) for one in found],
            "total": usage_rows.sum_row(total[0], usage_rows.SUM_COLUMNS) if total else None,
        }
    )


def _csv(text: str, name: str) -> Response:
    return Response(text, media_type=_CSV, headers={"content-disposition": f'attachment; filename="{name}"'})


def _wants_csv(request: Request, given: str | None) -> bool:
    return given == "csv" if given is not None else request.headers.get("accept", "").startswith(_CSV)


def _groups(group_by: str, allowed: Sequence[UsageGroup]) -> tuple[UsageGroup, ...]:
    try:
        return usage_rows.parse_groups(group_by, allowed)
    except ValueError as error:
        raise InvalidRequest(f"Invalid 'group_by': {error}", param="group_by") from error


def _time(param: str, text: str | None) -> float | None:
    try:
        return None if text is None else parse_since(text, time.time())
    except ValueError as error:
        raise InvalidRequest(f"Invalid '{param}': {error}", param=param) from error
