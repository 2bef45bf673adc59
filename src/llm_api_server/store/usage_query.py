"""Reads the ledger: sums by group, from days and, at the edges, hours; and single requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import CTE, ColumnElement, Connection, Row, Select, Table, func, or_, select, true, union_all

from llm_api_server.store.ledger_rows import RequestRow, UsageQuery, UsageSum
from llm_api_server.store.schema import DAYS, HOURS, KEYS, REQUESTS

HOUR = 3600
DAY = 86400
_COUNTS = ("requests", "errors", "aborted", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_TIMES = ("seconds", "queued_seconds", "queued_count", "first_token_seconds", "first_token_count")


def start_of(at: float, seconds: int) -> int:
    """Return the start of the hour or day (UTC) of `at`."""
    return int(at // seconds) * seconds


def month_of(at: float) -> tuple[int, int]:
    """Return the starts of the month (UTC) of `at` and of the next."""
    first = datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return int(first.timestamp()), int(following.timestamp())


def read_sums(connection: Connection, wanted: UsageQuery) -> list[UsageSum]:
    sums = _source(wanted).cte("sums")
    name = func.coalesce(KEYS.c.name, sums.c.key_name)
    groups: dict[str, list[ColumnElement[Any]]] = {
        "key": [sums.c.key_id],
        "model": [sums.c.model],
        "day": [sums.c.start - sums.c.start % DAY],
        "hour": [sums.c.start],
    }
    by = [column.label(group) for group in groups if group in wanted.group_by for column in groups[group]]
    filters = [
        column == value
        for column, value in ((sums.c.key_id, wanted.key_id), (name, wanted.key_name), (sums.c.model, wanted.model))
        if value is not None
    ]
    shown = [func.max(name).label("key_name")] if "key" in wanted.group_by else []
    statement: Select[Any] = (
        select(*by, *shown, *(func.sum(sums.c[column]).label(column) for column in (*_COUNTS, *_TIMES)))
        .select_from(_with_keys(sums))
        .where(*filters)
        .having(func.count() > 0)
    )
    if by:
        statement = statement.group_by(*by).order_by(*by)
    return [_sum(row, wanted) for row in connection.execute(statement)]


def read_rows(
    connection: Connection, filters: Sequence[ColumnElement[bool]], key_name: str | None, limit: int
) -> list[RequestRow]:
    statement = select(REQUESTS).where(*filters).order_by(REQUESTS.c.id.desc()).limit(limit)
    if key_name is not None:
        named = select(KEYS.c.id).where(KEYS.c.name == key_name)
        renamed = select(KEYS.c.id).where(KEYS.c.name != key_name, KEYS.c.id == REQUESTS.c.key_id).exists()
        statement = statement.where(or_(REQUESTS.c.key_id.in_(named), (REQUESTS.c.key_name == key_name) & ~renamed))
    return [RequestRow(**row._asdict()) for row in connection.execute(statement)]


def _with_keys(sums: CTE) -> Any:
    """Join the keys for their current names; deleted keys and keys of the configuration keep the name of the row."""
    return sums.outerjoin(KEYS, KEYS.c.id == sums.c.key_id)


def _source(wanted: UsageQuery) -> Any:
    """Select the sums to read: days for whole days, hours for the rest."""
    since = start_of(wanted.since, HOUR) if wanted.since is not None else None
    until = math.ceil(wanted.until / HOUR) * HOUR if wanted.until is not None else None
    if "hour" in wanted.group_by:
        return _between(HOURS, since, until)
    first = math.ceil(since / DAY) * DAY if since is not None else None
    last = start_of(until, DAY) if until is not None else None
    if since is not None and until is not None and math.ceil(since / DAY) * DAY > start_of(until, DAY):
        return _between(HOURS, since, until)
    parts = [_between(DAYS, first, last)]
    if since != first:
        parts.append(_between(HOURS, since, first))
    if until != last:
        parts.append(_between(HOURS, last, until))
    return union_all(*parts)


def _between(table: Table, since: int | None, until: int | None) -> Select[Any]:
    start = table.c.start
    return select(table).where(
        start >= since if since is not None else true(), start < until if until is not None else true()
    )


def _sum(row: Row[Any], wanted: UsageQuery) -> UsageSum:
    values = row._asdict()
    return UsageSum(
        key_id=values.get("key"),
        key_name=values.get("key_name"),
        model=values.get("model"),
        day=_iso(values["day"])[:10] if "day" in wanted.group_by else None,
        hour=_iso(values["hour"]) if "hour" in wanted.group_by else None,
        seconds=float(values["seconds"]),
        first_token=_average(values["first_token_seconds"], values["first_token_count"]),
        queued=_average(values["queued_seconds"], values["queued_count"]),
        **{name: int(values[name]) for name in _COUNTS},
    )


def _average(total: float, count: int) -> float | None:
    return float(total) / int(count) if count else None


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
