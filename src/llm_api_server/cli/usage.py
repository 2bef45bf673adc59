"""Command `usage`: reads the ledger from the database itself, whether or not a server runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_api_server import formats
from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.redaction import one_line
from llm_api_server.times import as_utc
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.store.ledger_rows import RequestRow, UsageQuery, UsageSum
    from llm_api_server.store.usage import UsageLedger
    from llm_api_server.types import UsageGroup


def usage(
    *,
    by: Annotated[
        str,
        typer.Option(metavar="key,model,day,hour", help="Fields to group by, with commas. none: a single total."),
    ] = "key",
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start: 7d (7 days ago), 2027-01-31 or 2027-01-31T12:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="End of the period.")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key, by name or id.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    requests: Annotated[bool, typer.Option("--requests", help="List single requests, newest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="With --requests: max requests to list.")] = 100,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show usage: requests, tokens, times. Days and hours are in UTC."""
    if as_csv and as_json:
        base.fail("Give --csv or --json, not both.", ExitCode.WRONG)
    if requests and (since or until):
        base.fail("--requests lists the newest requests: use --limit instead of --since and --until.", ExitCode.WRONG)
    groups = _groups(by)
    period = _time(since), _time(until)
    loaded = base.load(config)
    with base.open_database(loaded.storage_url) as database:
        from llm_api_server.admin.keys import ManagedKeys
        from llm_api_server.store.keys import Keys
        from llm_api_server.store.ledger_rows import UsageQuery
        from llm_api_server.store.usage import UsageLedger

        ledger = UsageLedger(database)
        only = ManagedKeys(loaded.auth, loaded.source, Keys(database)).picked(key)
        if requests:
            _print_requests(ledger.rows(limit=limit, model=model, **only), as_csv=as_csv, as_json=as_json)
        else:
            query = UsageQuery(since=period[0], until=period[1], model=model, group_by=groups, **only)
            _print_sums(ledger, query, as_csv=as_csv, as_json=as_json)


def _print_requests(rows: Sequence[RequestRow], *, as_csv: bool, as_json: bool) -> None:
    from llm_api_server.admin import usage_rows

    if as_csv:
        typer.echo(usage_rows.requests_csv(rows), nl=False)
        return
    data = [usage_rows.request_row(row) for row in rows]
    base.show(_requests_table(data), {"data": data}, as_json=as_json)


def _print_sums(ledger: UsageLedger, query: UsageQuery, *, as_csv: bool, as_json: bool) -> None:
    import msgspec

    from llm_api_server.admin import usage_rows

    sums = ledger.query(query)
    if as_csv:
        typer.echo(usage_rows.sums_csv(sums, query.group_by), nl=False)
        return
    total = ledger.query(msgspec.structs.replace(query, group_by=()))
    if not as_json:
        typer.echo(_sums_table(sums, total, query.group_by))
        return
    columns = usage_rows.sum_columns(query.group_by)
    data = [usage_rows.sum_row(one, columns) for one in sums]
    base.print_json({"data": data, "total": usage_rows.sum_row(total[0], usage_rows.SUM_COLUMNS) if total else None})


def _groups(by: str) -> tuple[UsageGroup, ...]:
    from llm_api_server.admin.usage_rows import parse_groups

    try:
        return parse_groups(by)
    except ValueError as error:
        base.fail(f"--by: {error}", ExitCode.WRONG)


def _time(text: str | None) -> float | None:
    import time

    from llm_api_server.times import parse_since

    try:
        return None if text is None else parse_since(text, time.time())
    except ValueError as error:
        base.fail(str(error), ExitCode.WRONG)


#: Columns of the tables, by field; CSV and JSON have more.
_SUM_COLUMNS = {
    "requests": "REQUESTS",
    "errors": "ERRORS",
    "aborted": "ABORTED",
    "prompt_tokens": "PROMPT",
    "cached_tokens": "CACHED",
    "completion_tokens": "COMPLETION",
    "reasoning_tokens": "REASONING",
    "first_token": "FIRST TOKEN",
    "queued": "QUEUED",
}
_REQUEST_COLUMNS = {
    "started_at": "STARTED",
    "key_name": "KEY",
    "model": "MODEL",
    "endpoint": "ENDPOINT",
    "status": "STATUS",
    "error": "ERROR",
    "prompt_tokens": "PROMPT",
    "completion_tokens": "COMPLETION",
    "first_token": "FIRST TOKEN",
    "duration": "SECONDS",
    "request_id": "REQUEST ID",
}
_SECONDS = {"first_token", "queued", "duration"}


def _sums_table(sums: Sequence[UsageSum], total: Sequence[UsageSum], groups: Sequence[UsageGroup]) -> str:
    """Return a line for each group, then the totals."""
    from llm_api_server.admin import usage_rows

    if not sums:
        return "No usage is recorded."
    columns = {usage_rows.GROUP_COLUMNS[group][0]: group.upper() for group in groups} | _SUM_COLUMNS

    def cells(one: UsageSum) -> list[str]:
        return [_cell(name, value) for name, value in usage_rows.sum_row(one, list(columns)).items()]

    rows = [cells(one) for one in sums]
    if groups:
        rows.append(["TOTAL", *[""] * (len(groups) - 1), *cells(total[0])[len(groups) :]])
    return formats.as_table([list(columns.values()), *rows])


def _requests_table(requests: Sequence[dict[str, Any]]) -> str:
    if not requests:
        return "No requests are recorded."
    rows = [[_cell(name, request[name]) for name in _REQUEST_COLUMNS] for request in requests]
    return formats.as_table([list(_REQUEST_COLUMNS.values()), *rows])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "started_at":
        return as_utc(value)
    return f"{value:.2f} s" if name in _SECONDS else one_line(str(value))
