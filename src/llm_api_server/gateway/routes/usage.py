"""Usage reports: `/v1/usage` for the caller's own key; `/admin/api/usage` and `/admin/api/requests` for all keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from msgspec import Meta

from llm_api_server.admin import usage_rows
from llm_api_server.admin.keys import PickedKey
from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.routes.admin_router import admin_router
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.gateway.routes.store_access import MAX_INTEGER, NO_NUL, StoreAccess, Stored
from llm_api_server.gateway.routes.struct_router import model_of
from llm_api_server.store.ledger_rows import RequestRow, UsageQuery, UsageSum, UsageTotal
from llm_api_server.times import parse_since
from llm_api_server.types import UsageGroup

_OWN_GROUPS: tuple[UsageGroup, ...] = ("model", "day", "hour")
_CSV = "text/csv"
_CSV_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {_CSV: {"schema": {"type": "string"}}}}}

Format = Annotated[
    Literal["json", "csv"] | None, Query(description="Default: by the `Accept` header, `text/csv` or else JSON.")
]
ModelFilter = Annotated[str | None, Query(pattern=NO_NUL, description="Only this model.")]
KeyFilter = Annotated[str | None, Query(pattern=NO_NUL, description="Only this key: its id or name.")]


class UsageReport(msgspec.Struct):
    """Usage of ended requests; requests in progress are not counted."""

    data: list[UsageSum]
    total: Annotated[UsageTotal | None, Meta(description="null: no usage.")]


class RequestList(msgspec.Struct):
    data: list[RequestRow]


@dataclass(frozen=True)
class TimeRange:
    """Times in Unix seconds; None: open."""

    since: float | None
    until: float | None


def _time_range(
    since: Annotated[str | None, Query(description="7d, 2027-01-31, 2027-01-31T12:00:00Z or Unix seconds.")] = None,
    until: Annotated[str | None, Query(description="In the form of `since`; exclusive.")] = None,
) -> TimeRange:
    return TimeRange(_time("since", since), _time("until", until))


TimeRangeDependency = Annotated[TimeRange, Depends(_time_range)]


def usage_routes(store: StoreAccess) -> APIRouter:
    """`/v1/usage`."""
    router = APIRouter(tags=["usage"])

    @router.get(
        "/v1/usage",
        summary="Report the usage of the caller's key",
        response_model=model_of(UsageReport),
        responses=_CSV_RESPONSE,
    )
    async def own_usage(
        key: KeyDependency,
        request: Request,
        span: TimeRangeDependency,
        group_by: Annotated[str, Query(description="One or several of model, day, hour; empty: one sum.")] = "model",
        model: ModelFilter = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        groups = _groups(group_by, _OWN_GROUPS)
        sums = await store.call(_reader(groups, span, model, lambda _: {"key_id": key.key_id}))
        return _report(*sums, groups, as_csv=_wants_csv(request, format))

    return router


def admin_usage_routes(store: StoreAccess) -> APIRouter:
    """`/admin/api/usage`, `/admin/api/requests`."""
    router = admin_router()

    @router.get(
        "/usage", summary="Report the usage of all keys", response_model=model_of(UsageReport), responses=_CSV_RESPONSE
    )
    async def usage(
        request: Request,
        span: TimeRangeDependency,
        group_by: Annotated[str, Query(description="One or several of key, model, day, hour; empty: one sum.")] = "key",
        key: KeyFilter = None,
        model: ModelFilter = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        groups = _groups(group_by, usage_rows.GROUPS)
        sums = await store.call(_reader(groups, span, model, lambda stored: stored.managed.picked(key)))
        return _report(*sums, groups, as_csv=_wants_csv(request, format))

    @router.get(
        "/requests",
        summary="List single requests, newest first",
        response_model=model_of(RequestList),
        responses=_CSV_RESPONSE,
    )
    async def requests(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        before: Annotated[
            int | None, Query(ge=0, le=MAX_INTEGER, description="Only requests before the one with this id.")
        ] = None,
        key: KeyFilter = None,
        model: ModelFilter = None,
        format: Format = None,  # noqa: A002 - the name of the parameter
    ) -> Response:
        rows = await store.call(
            lambda stored: stored.usage.rows(limit=limit, before=before, model=model, **stored.managed.picked(key))
        )
        if _wants_csv(request, format):
            return _csv(usage_rows.requests_csv(rows), "requests.csv")
        return JSONResponse({"data": [usage_rows.request_row(row) for row in rows]})

    return router


def _reader(
    groups: tuple[UsageGroup, ...], span: TimeRange, model: str | None, pick: Callable[[Stored], PickedKey]
) -> Callable[[Stored], tuple[list[UsageSum], list[UsageSum]]]:
    """Return a function that reads the sums of the groups, and the total as a list of at most one sum."""

    def read(stored: Stored) -> tuple[list[UsageSum], list[UsageSum]]:
        query = UsageQuery(since=span.since, until=span.until, model=model, group_by=groups, **pick(stored))
        return stored.usage.query(query), stored.usage.query(msgspec.structs.replace(query, group_by=()))

    return read


def _report(
    sums: Sequence[UsageSum], total: Sequence[UsageSum], groups: Sequence[UsageGroup], *, as_csv: bool
) -> Response:
    if as_csv:
        return _csv(usage_rows.sums_csv(sums, groups), "usage.csv")
    columns = usage_rows.sum_columns(groups)
    return JSONResponse(
        {
            "data": [usage_rows.sum_row(one, columns) for one in sums],
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
