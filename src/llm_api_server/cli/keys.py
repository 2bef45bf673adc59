"""`llm-api-server keys`: makes, shows and changes keys in the database itself, whether or not a server runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode, PriorityClass

if TYPE_CHECKING:
    from llm_api_server.admin.keys import ListedKey, ManagedKeys
    from llm_api_server.store.key_fields import Actor, KeyFields
    from llm_api_server.store.keys import Keys

app = typer.Typer(help="Keys, their limits, and who changed them.", no_args_is_help=True, rich_markup_mode=None)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key's name or id.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the secret alone.")]
_LIMIT = "NUMBER|none"

NameOption = Annotated[str | None, typer.Option(help="Its name, in logs and accounts; unique.")]
NoteOption = Annotated[str | None, typer.Option(help="Whose it is, or what for; empty: none.")]
PermissionOption = Annotated[
    list[str] | None, typer.Option(help="What it may call; several: again, or with commas. Default: all.")
]
ModelOption = Annotated[
    list[str] | None, typer.Option(help="Models it may use, shell patterns; several: again, or with commas.")
]
RequestsOption = Annotated[str | None, typer.Option(metavar=_LIMIT, help="Most requests in any 60 seconds.")]
TokensOption = Annotated[str | None, typer.Option(metavar=_LIMIT, help="Most tokens in any 60 seconds.")]
ConcurrentOption = Annotated[str | None, typer.Option(metavar=_LIMIT, help="Most requests at the same time.")]
DayOption = Annotated[str | None, typer.Option(metavar=_LIMIT, help="Most tokens in a day (UTC).")]
MonthOption = Annotated[str | None, typer.Option(metavar=_LIMIT, help="Most tokens in a month (UTC).")]
PriorityOption = Annotated[float | None, typer.Option(help="Weight of its requests where several wait. Default: 1.")]
ClassOption = Annotated[
    PriorityClass | None, typer.Option(help="batch: served when no other request waits. Default: interactive.")
]
ExpiresOption = Annotated[
    str | None, typer.Option(metavar="TIME|never", help="When it ends: 30d, 2027-01-31, 2027-01-31T12:00:00Z.")
]
NetworkOption = Annotated[
    list[str] | None,
    typer.Option(help="Networks it may be used from, such as 10.0.0.0/8; several: as above; none: all."),
]
EnabledOption = Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it is let in.")]


@app.command("new")
def keys_new(*, as_json: JsonOption = False) -> None:
    """Print a random key and the line that admits it without holding it. Stores nothing."""
    from llm_api_server.auth.access import digest, new_key

    key = new_key()
    if as_json:
        base.print_json({"key": key, "hash": f"sha256:{digest(key)}"})
        return
    typer.echo(f"key:    {key}")
    typer.echo(f'config: - {{key: "sha256:{digest(key)}", name: NAME, permissions: [all]}}')
    typer.echo("The key is shown only here. Put the line into auth.api_keys, then `llm-api-server reload`.", err=True)


@app.command("create")
def keys_create(
    *,
    name: Annotated[str, typer.Option(help="Its name, in logs and accounts; unique.")],
    note: NoteOption = None,
    permission: PermissionOption = None,
    model: ModelOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_concurrent: ConcurrentOption = None,
    tokens_per_day: DayOption = None,
    tokens_per_month: MonthOption = None,
    priority: PriorityOption = None,
    priority_class: ClassOption = None,
    expires: ExpiresOption = None,
    network: NetworkOption = None,
    enabled: EnabledOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a key in the store. A running server knows it at once."""
    given = {
        "name": name, "note": note, "permissions": permission, "models": model,
        "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent, "tokens_per_day": tokens_per_day, "tokens_per_month": tokens_per_month,
        "priority": priority, "priority_class": priority_class, "expires_at": expires, "networks": network,
        "enabled": enabled,
    }  # fmt: skip
    with _managed(config) as (keys, _):
        key, secret = keys.create(_fields(given), _actor())
        _print_secret(f"Created the key {key.name!r} ({key.id}).", key, secret, quiet=quiet, as_json=as_json)


@app.command("list")
def keys_list(*, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show all keys, those of the configuration among them."""
    from llm_api_server.cli import keys_view

    with _managed(config) as (keys, _):
        listed = keys.list()
        typer.echo(keys_view.as_json(listed) if as_json else keys_view.as_table(listed))


@app.command("show")
def keys_show(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show all there is to know about one key."""
    with _managed(config) as (keys, _):
        _print_key(keys.get(key), as_json=as_json)


@app.command("update")
def keys_update(
    key: KeyArgument,
    *,
    name: NameOption = None,
    note: NoteOption = None,
    permission: PermissionOption = None,
    model: ModelOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    max_concurrent: ConcurrentOption = None,
    tokens_per_day: DayOption = None,
    tokens_per_month: MonthOption = None,
    priority: PriorityOption = None,
    priority_class: ClassOption = None,
    expires: ExpiresOption = None,
    network: NetworkOption = None,
    enabled: EnabledOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Change what is given; `none` and `never` take a limit away. All workers know within a second."""
    given = {
        "name": name, "note": note, "permissions": permission, "models": model,
        "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent, "tokens_per_day": tokens_per_day, "tokens_per_month": tokens_per_month,
        "priority": priority, "priority_class": priority_class, "expires_at": expires, "networks": network,
        "enabled": enabled,
    }  # fmt: skip
    if all(value is None or value == [] for value in given.values()):
        base.fail("Nothing to change: give at least one option.", ExitCode.WRONG)
    with _managed(config) as (keys, _):
        _print_key(keys.update(key, _fields(given), _actor()), as_json=as_json)


@app.command("rotate")
def keys_rotate(
    key: KeyArgument,
    *,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old secret stays valid; 0: ends now.")
    ] = "24h",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a key a new secret."""
    from llm_api_server.times import as_utc, parse_duration

    try:
        seconds = parse_duration(overlap)
    except ValueError as error:
        base.fail(f"--overlap: {error}", ExitCode.WRONG)
    with _managed(config) as (keys, _):
        new, secret = keys.rotate(key, seconds, _actor())
        until = new.old_secret_until
        old = "The old secret has ended." if until is None else f"The old secret ends at {as_utc(until)}."
        _print_secret(f"Rotated the key {new.name!r} ({new.id}). {old}", new, secret, quiet=quiet, as_json=as_json)


@app.command("revoke")
def keys_revoke(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """End a key for good, and the tokens made from it; its record stays."""
    with _managed(config) as (keys, _):
        revoked = keys.revoke(key, _actor())
        if as_json:
            _print_key(revoked, as_json=True)
        else:
            typer.echo(f"Revoked the key {revoked.name!r} ({revoked.id}).")


@app.command("delete")
def keys_delete(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Remove a key; what it used and who changed it stays under its name."""
    with _managed(config) as (keys, _):
        gone = keys.delete(key, _actor())
        if as_json:
            base.print_json({"deleted": gone.id, "name": gone.name})
        else:
            typer.echo(f"Deleted the key {gone.name!r} ({gone.id}).")


@app.command("audit")
def keys_audit(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A key's name, also a former one, or id.")] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most changes to show.")] = 100,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show who changed which key, newest first."""
    from llm_api_server.cli import keys_view

    with _managed(config) as (_, store):
        entries = store.audit(key=key, limit=limit)
        typer.echo(keys_view.as_json(entries) if as_json else keys_view.audit_table(entries))


@contextmanager
def _managed(path: Path | None) -> Iterator[tuple[ManagedKeys, Keys]]:
    """All keys, and those of the store alone, while the database is open."""
    loaded = base.load(path)
    with base.errors(loaded):
        from llm_api_server.admin.keys import ManagedKeys
        from llm_api_server.store.database import Database
        from llm_api_server.store.keys import Keys

        database = Database(loaded.storage_url)
        try:
            keys = Keys(database)
            yield ManagedKeys(loaded, keys), keys
        finally:
            database.close()


def _actor() -> Actor:
    import getpass
    import os

    from llm_api_server.store.key_fields import Actor

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in containers
        user = str(os.getuid())
    return Actor(f"cli:{user}")


def _fields(given: dict[str, Any]) -> KeyFields:
    """What the options say. Raises `InvalidKeyField`."""
    from llm_api_server.store.key_fields import KeyFields

    return KeyFields(**{field: _value(field, value) for field, value in given.items() if value not in (None, [])})


def _value(field: str, value: Any) -> Any:
    import time

    from llm_api_server.errors import InvalidKeyField
    from llm_api_server.times import parse_end

    match field:
        case "permissions" | "models" | "networks":
            return _words(value)
        case "note":
            return value or None
        case "expires_at":
            try:
                return None if value in {"never", "none"} else parse_end(value, time.time())
            except ValueError as error:
                raise InvalidKeyField("expires", str(error)) from error
        case "name" | "priority" | "priority_class" | "enabled":
            return value
    if value == "none":
        return None
    try:
        return int(value)
    except ValueError as error:
        raise InvalidKeyField(field, f"{value!r} is neither a number nor 'none'.") from error


def _words(values: Sequence[str]) -> list[str]:
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    return [] if words == ["none"] else words


def _print_key(key: ListedKey, *, as_json: bool) -> None:
    from llm_api_server.cli import keys_view

    typer.echo(keys_view.as_json(key) if as_json else keys_view.as_lines(key))


def _print_secret(done: str, key: ListedKey, secret: str, *, quiet: bool, as_json: bool) -> None:
    """The only place that shows it."""
    from llm_api_server.cli import keys_view

    if as_json:
        typer.echo(keys_view.as_json(key, secret=secret))
    elif quiet:
        typer.echo(secret)
    else:
        typer.echo(done)
        typer.echo(f"key: {secret}")
        typer.echo("The key is shown only here: keep it now.", err=True)
