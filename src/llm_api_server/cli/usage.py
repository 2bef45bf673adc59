"""`llm-api-server usage`: reads the ledger from the database itself, whether or not a server runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.admin.keys import ManagedKeys
    from llm_api_server.config.models import Config
    from llm_api_server.store.usage import RequestRow, UsageLedger, UsageQuery
    from llm_api_server.types import UsageGroup

CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV.")]


def usage(
    *,
    by: Annotated[str, typer.Option(metavar="key,model,day,hour", help="What to sum up by; none: one sum.")] = "key",
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From 7d ago, 2027-01-31 or 2027-01-31T12:00:00Z on.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Up to this time.")] = None,
    key: Annotated[str | None, typer.Option(help="Only of this key: its name or id.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    requests: Annotated[bool, typer.Option("--requests", help="Show single requests, newest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="With --requests: most of them.")] = 100,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show what was used: requests, tokens, times. Hours and days are those of UTC."""
    if as_csv and as_json:
        base.fail("Give --csv or --json, not both.", ExitCode.WRONG)
    if requests and (since or until):
        base.fail("--requests shows the newest ones: use --limit instead of --since and --until.", ExitCode.WRONG)
    groups = _groups(by)
    span = _time(since), _time(until)
    loaded = base.load(config)
    with _ledger(loaded) as (ledger, keys):
        only = keys.picked(key)
        if requests:
            _print_requests(ledger.rows(limit=limit, model=model, **only), as_csv=as_csv, as_json=as_json)
            return
        from llm_api_server.store.usage import UsageQuery

        query = UsageQuery(since=span[0], until=span[1], model=model, group_by=groups, **only)
        _print_sums(ledger, query, as_csv=as_csv, as_json=as_json)


def _print_requests(rows: Sequence[RequestRow], *, as_csv: bool, as_json: bool) -> None:
    from llm_api_server.admin import usage_rows
    from llm_api_server.cli import usage_view

    if as_csv:
        typer.echo(usage_rows.requests_csv(rows), nl=False)
    else:
        typer.echo(usage_view.requests_json(rows) if as_json else usage_view.requests_table(rows))


def _print_sums(ledger: UsageLedger, query: UsageQuery, *, as_csv: bool, as_json: bool) -> None:
    import msgspec

    from llm_api_server.admin import usage_rows
    from llm_api_server.cli import usage_view

    found = ledger.query(query)
    if as_csv:
        typer.echo(usage_rows.sums_csv(found, query.group_by), nl=False)
        return
    total = ledger.query(msgspec.structs.replace(query, group_by=()))
    show = usage_view.sums_json if as_json else usage_view.sums_table
    typer.echo(show(found, total, query.group_by))


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


@contextmanager
def _ledger(config: Config) -> Iterator[tuple[UsageLedger, ManagedKeys]]:
    """While the database is open."""
    with base.errors(config):
        from llm_api_server.admin.keys import ManagedKeys
        from llm_api_server.store.database import Database
        from llm_api_server.store.keys import Keys
        from llm_api_server.store.usage import UsageLedger

        database = Database(config.storage_url)
        try:
            yield UsageLedger(database), ManagedKeys(config, Keys(database))
        finally:
            database.close()
