"""The ledger: a row per request, and sums per hour and day that grow when a row is settled.

Rows are settled and sums increased in one transaction, so both agree at any time. The sums outlive the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    RowMapping,
    Table,
    bindparam,
    case,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from llm_api_server.ipc.usage_events import (
    CLIENT_CLOSED,
    WORKER_LOST,
    Batch,
    FinishedRequest,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    Usage,
)
from llm_api_server.store.database import Database
from llm_api_server.store.ledger_rows import RequestRow, UsageQuery, UsageSum
from llm_api_server.store.schema import DAYS, HOURS, KEYS, REQUESTS, cleaned
from llm_api_server.store.usage_query import DAY, HOUR, month_of, read_rows, read_sums, start_of

#: Lock of the writers on PostgreSQL; with SQLite there is one writer anyway.
_LOCK = 5_021_101
_WITHOUT_PROMPT = [column for column in REQUESTS.c if column is not REQUESTS.c.prompt]
_IS_OPEN = REQUESTS.c.ended_at.is_(None)
#: Parameters of one statement, and rows that one transaction deletes, at most.
_CHUNK = 500
_PRUNE_CHUNK = 5000
_CLIENT_CLOSED_STATUS = 499
_FIRST_ERROR_STATUS = 400
#: Larger token counts are capped.
_MAX_TOKENS = 2**53
#: Longer names are cut: PostgreSQL could not index them.
_MAX_NAME_CHARS = 512
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
#: Columns of a row that is written when its request has ended ...
_COLUMNS = (
    "row", "worker", "request_id", "key_id", "key_name", "model", "endpoint", "stream", "started_at", "ended_at",
    "status", "instance", *_TOKENS, "queued", "first_token", "duration",
)  # fmt: skip
#: ... and columns that are nearly always empty: SQLite's driver takes longer for a None than for a text.
_RARE_COLUMNS = ("prompt", "error")
_ADDED = (
    "requests", "errors", "aborted", *_TOKENS,
    "seconds", "queued_seconds", "queued_count", "first_token_seconds", "first_token_count",
)  # fmt: skip


class UsageLedger:
    """Usage of all requests. Methods raise `StoreError` if the database cannot be used."""

    def __init__(
        self, database: Database, *, clock: Callable[[], float] = time.time, prune_chunk: int = _PRUNE_CHUNK
    ) -> None:
        self._database = database
        self._clock = clock
        self._prune_chunk = prune_chunk

    def write(self, batch: Batch, worker: str) -> None:
        """Write the events of a worker, all or none; writing them twice changes nothing.

        Progress and ends of unknown and of settled rows are ignored.
        """
        with self._database.writing(_LOCK) as connection:
            _insert_finished(connection, batch.finished, worker)
            _insert_started(connection, batch.started, worker)
            _write_progress(connection, batch.progress)
            # Reversed: the first end of a row counts.
            _settle(connection, {end.row: end for end in reversed(batch.ended)})
            _write_last_used(connection, [*batch.started, *batch.finished])

    def settle_lost(self, *, except_workers: Collection[str] = ()) -> int:
        """Settle the open rows of all other workers with the usage last reported; return their number."""
        wanted = select(*_WITHOUT_PROMPT).where(_IS_OPEN, REQUESTS.c.worker.not_in(list(except_workers)))
        with self._database.writing(_LOCK) as connection:
            rows = connection.execute(wanted.order_by(REQUESTS.c.id)).mappings().all()
            now = self._clock()
            lost = [dict(row) | {"error": WORKER_LOST, "ended_at": max(now, row["started_at"])} for row in rows]
            _write_ends(connection, lost)
        return len(lost)

    def spent(self, key_id: str, now: float) -> tuple[int, int]:
        """Return the tokens that a key used in the UTC day and in the UTC month of `now`, open requests included.

        A request counts in the day in which it started.
        """
        today, (month, next_month) = start_of(now, DAY), month_of(now)
        open_ = select(
            _total(REQUESTS, REQUESTS.c.started_at >= today).label("day"), _total(REQUESTS).label("month")
        ).where(
            _IS_OPEN,
            REQUESTS.c.key_id == key_id,
            REQUESTS.c.started_at >= month,
            REQUESTS.c.started_at < min(today + DAY, next_month),
        )
        settled = select(_total(DAYS, DAYS.c.start == today).label("day"), _total(DAYS).label("month")).where(
            DAYS.c.key_id == key_id, DAYS.c.start >= month, DAYS.c.start <= today
        )
        # One statement, so that a row that is settled meanwhile counts once.
        both = open_.union_all(settled).subquery()
        with self._database.reading() as connection:
            row = connection.execute(select(func.sum(both.c.day), func.sum(both.c.month))).one()
        return int(row[0]), int(row[1])

    def query(self, wanted: UsageQuery) -> list[UsageSum]:
        """Return the sums of ended requests by group."""
        with self._database.reading() as connection:
            return read_sums(connection, wanted)

    def rows(
        self,
        *,
        limit: int = 100,
        before: int | None = None,
        key_id: str | None = None,
        key_name: str | None = None,
        model: str | None = None,
    ) -> list[RequestRow]:
        """Return single requests, the newest first; `before` is the id of a row."""
        filters = [
            column == value
            for column, value in ((REQUESTS.c.key_id, key_id), (REQUESTS.c.model, model))
            if value is not None
        ]
        if before is not None:
            filters.append(REQUESTS.c.id < before)
        with self._database.reading() as connection:
            return read_rows(connection, filters, key_name, limit)

    def prune(self, now: float, keep_requests: int, keep_hours: int, keep_days: int) -> int:
        """Delete settled rows, hours and days older than the given numbers of days; return the number of rows."""
        count = self._prune_rows(now - keep_requests * DAY)
        with self._database.writing(_LOCK) as connection:
            for table, days in ((HOURS, keep_hours), (DAYS, keep_days)):
                count += connection.execute(
                    delete(table).where(table.c.start < start_of(now, DAY) - days * DAY)
                ).rowcount
        return count

    def _prune_rows(self, before: float) -> int:
        """Delete in chunks, so that new events are written in between."""
        old = select(REQUESTS.c.id).where(REQUESTS.c.started_at < before, ~_IS_OPEN).limit(self._prune_chunk)
        count = 0
        while True:
            with self._database.writing(_LOCK) as connection:
                deleted = connection.execute(delete(REQUESTS).where(REQUESTS.c.id.in_(old))).rowcount
            count += deleted
            if deleted < self._prune_chunk:
                return count


def _total(table: Table, where: ColumnElement[bool] | None = None) -> ColumnElement[int]:
    tokens: ColumnElement[int] = table.c.prompt_tokens + table.c.completion_tokens
    return func.coalesce(func.sum(tokens if where is None else case((where, tokens), else_=0)), 0)


def _insert_finished(connection: Connection, rows: Sequence[FinishedRequest], worker: str) -> None:
    """Insert requests that started and ended in one batch: most requests of a busy server."""
    if not rows:
        return
    is_sqlite = connection.dialect.name == "sqlite"
    flag: Callable[[bool], int] = int if is_sqlite else bool  # SQLite's driver takes long for a bool
    usual = [_values(row, worker, flag) for row in rows if row.prompt is None and row.error is None]
    rare = [
        (*_values(row, worker, flag), cleaned(row.prompt), row.error)
        for row in rows
        if row.prompt is not None or row.error is not None
    ]
    try:
        with connection.begin_nested():
            for names, values in ((_COLUMNS, usual), ((*_COLUMNS, *_RARE_COLUMNS), rare)):
                if values:
                    # Not by SQLAlchemy: to build its parameters takes several times as long as SQLite's insert.
                    connection.exec_driver_sql(_insert_sql(names, "?" if is_sqlite else "%s"), values)
    except IntegrityError:  # some rows were written before
        known = {row["row"] for row in _rows(connection, [row.row for row in rows], [REQUESTS.c.row])}
        _insert_finished(connection, [row for row in rows if row.row not in known], worker)
    else:
        _add_to_sums(connection, rows)


def _insert_sql(names: Sequence[str], mark: str) -> str:
    columns = ", ".join(f'"{name}"' for name in names)
    return f"INSERT INTO requests ({columns}) VALUES ({', '.join([mark] * len(names))})"  # noqa: S608 - made of constants


def _values(row: FinishedRequest, worker: str, flag: Callable[[bool], int]) -> tuple[Any, ...]:
    """Return the values of `_COLUMNS`."""
    usage = row.usage
    return (
        row.row, worker, _name(row.request_id), _known_name(row.key_id), _known_name(row.key_name),
        _known_name(row.model), row.endpoint, flag(row.stream), row.at, row.at + row.duration, row.status, row.instance,
        _count(usage.prompt_tokens), _count(usage.cached_tokens), _count(usage.completion_tokens),
        _count(usage.reasoning_tokens), row.queued, row.first_token, row.duration,
    )  # fmt: skip


@lru_cache(4096)
def _known_name(text: str) -> str:
    """Return `_name(text)` for names that repeat."""
    return _name(text)


def _name(text: str) -> str:
    return cleaned(text[:_MAX_NAME_CHARS]) or ""


def _insert_started(connection: Connection, started: Sequence[RequestStarted], worker: str) -> None:
    if not started:
        return
    zeros = dict.fromkeys(_TOKENS, 0)
    rows = [
        {
            "row": start.row,
            "worker": worker,
            "request_id": start.request_id,
            "key_id": start.key_id[:_MAX_NAME_CHARS],
            "key_name": start.key_name[:_MAX_NAME_CHARS],
            "model": start.model[:_MAX_NAME_CHARS],
            "endpoint": start.endpoint,
            "stream": start.stream,
            "prompt": start.prompt,
            "started_at": start.at,
            **zeros,
        }
        for start in started
    ]
    connection.execute(_insert(connection, REQUESTS).on_conflict_do_nothing(index_elements=["row"]), rows)


def _write_progress(connection: Connection, progress: Sequence[RequestProgress]) -> None:
    """Raise the counts of open rows: an older event that is repeated must not lower them."""
    if not progress:
        return
    values = [{"of_row": one.row, **_tokens(one.usage)} for one in progress]
    larger = {
        name: case((REQUESTS.c[name] < bindparam(name), bindparam(name)), else_=REQUESTS.c[name]) for name in _TOKENS
    }
    statement = update(REQUESTS).where(REQUESTS.c.row == bindparam("of_row"), _IS_OPEN).values(**larger)
    connection.execute(statement, values)


def _settle(connection: Connection, ends: Mapping[str, RequestEnded]) -> None:
    """Settle the rows of `ends` that are open."""
    settled = []
    for row in _rows(connection, list(ends), _WITHOUT_PROMPT, _IS_OPEN):
        end = ends[row["row"]]
        values = {
            name: getattr(end, name) for name in ("status", "error", "instance", "queued", "first_token", "duration")
        }
        settled.append(dict(row) | _tokens(end.usage) | values | {"ended_at": row["started_at"] + end.duration})
    _write_ends(connection, settled)


def _rows(
    connection: Connection, names: Sequence[str], columns: Sequence[Column[Any]], *where: ColumnElement[bool]
) -> Iterator[RowMapping]:
    for first in range(0, len(names), _CHUNK):
        wanted = select(*columns).where(REQUESTS.c.row.in_(names[first : first + _CHUNK]), *where)
        yield from connection.execute(wanted).mappings().all()


def _write_ends(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Write the ends of open rows and add them to the sums."""
    if not rows:
        return
    names = ("ended_at", "status", "error", "instance", *_TOKENS, "queued", "first_token", "duration")
    statement = update(REQUESTS).where(REQUESTS.c.id == bindparam("of_id"))
    connection.execute(
        statement.values({name: bindparam(name) for name in names}),
        [{"of_id": row["id"], **{name: row[name] for name in names}} for row in rows],
    )
    _add_to_sums(connection, [_finished(row) for row in rows])


def _finished(row: Mapping[str, Any]) -> FinishedRequest:
    names = ("row", "request_id", "key_id", "key_name", "model", "endpoint", "stream", "error", "instance")
    return FinishedRequest(
        **{name: row[name] for name in (*names, "queued", "first_token")},
        at=row["started_at"],
        prompt=None,
        status=row["status"] or 0,
        usage=Usage(**{name: row[name] for name in _TOKENS}),
        duration=row["duration"] or 0.0,
    )


def _add_to_sums(connection: Connection, rows: Collection[FinishedRequest]) -> None:
    hours = _summed(rows)
    for table, sums in ((HOURS, hours), (DAYS, _by_day(hours))):
        insert = _insert(connection, table)
        added = {name: table.c[name] + insert.excluded[name] for name in _ADDED}
        statement = insert.on_conflict_do_update(
            index_elements=["key_id", "start", "model"], set_={**added, "key_name": insert.excluded.key_name}
        )
        connection.execute(statement, list(sums.values()))


_Group = tuple[str, int, str]


def _summed(rows: Collection[FinishedRequest]) -> dict[_Group, dict[str, Any]]:
    """Sum up requests by key, hour and model."""
    groups: dict[_Group, list[FinishedRequest]] = {}
    for row in rows:
        groups.setdefault((row.key_id, start_of(row.at, HOUR), row.model), []).append(row)
    return {
        (key_id, start, model): {
            "key_id": _name(key_id),
            "start": start,
            "model": _name(model),
            "key_name": _name(group[-1].key_name),
            **_sum_of(group),
        }
        for (key_id, start, model), group in groups.items()
    }


def _by_day(hours: Mapping[_Group, dict[str, Any]]) -> dict[_Group, dict[str, Any]]:
    days: dict[_Group, dict[str, Any]] = {}
    for (key_id, hour, model), added in hours.items():
        start = start_of(hour, DAY)
        day = days.setdefault((key_id, start, model), {**added, "start": start, **dict.fromkeys(_ADDED, 0)})
        day |= {name: day[name] + added[name] for name in _ADDED}
    return days


def _sum_of(rows: Sequence[FinishedRequest]) -> dict[str, float]:
    aborted = sum([row.error == CLIENT_CLOSED or row.status == _CLIENT_CLOSED_STATUS for row in rows])
    failed = sum([row.error is not None or row.status >= _FIRST_ERROR_STATUS for row in rows])
    queued = [row.queued for row in rows if row.queued is not None]
    first_token = [row.first_token for row in rows if row.first_token is not None]
    return {
        "requests": len(rows),
        "errors": failed - aborted,  # aborted requests have an error as well
        "aborted": aborted,
        "prompt_tokens": sum([_count(row.usage.prompt_tokens) for row in rows]),
        "cached_tokens": sum([_count(row.usage.cached_tokens) for row in rows]),
        "completion_tokens": sum([_count(row.usage.completion_tokens) for row in rows]),
        "reasoning_tokens": sum([_count(row.usage.reasoning_tokens) for row in rows]),
        "seconds": sum([row.duration for row in rows]),
        "queued_seconds": sum(queued),
        "queued_count": len(queued),
        "first_token_seconds": sum(first_token),
        "first_token_count": len(first_token),
    }


def _write_last_used(connection: Connection, started: Sequence[RequestStarted | FinishedRequest]) -> None:
    last: dict[str, float] = {}
    for start in started:
        last[start.key_id] = max(start.at, last.get(start.key_id, start.at))
    if not last:
        return
    earlier = KEYS.c.last_used_at.is_(None) | (KEYS.c.last_used_at < bindparam("at"))
    statement = update(KEYS).where(KEYS.c.id == bindparam("of_id"), earlier).values(last_used_at=bindparam("at"))
    connection.execute(statement, [{"of_id": key_id, "at": last[key_id]} for key_id in sorted(last)])


def _tokens(usage: Usage) -> dict[str, int]:
    return {name: _count(getattr(usage, name)) for name in _TOKENS}


def _count(tokens: int) -> int:
    return tokens if 0 <= tokens <= _MAX_TOKENS else min(max(tokens, 0), _MAX_TOKENS)


def _insert(connection: Connection, table: Table) -> Any:
    """Return an insert with `ON CONFLICT`, which each dialect has in its own module."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # noqa: PLC0415 - large, and only one of the two is needed

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite  # noqa: PLC0415

    return sqlite.insert(table)
