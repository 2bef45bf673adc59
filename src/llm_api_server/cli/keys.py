"""Commands `keys …`: create, show and change keys in the database itself, whether or not a server runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_api_server import formats
from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.redaction import one_line
from llm_api_server.times import as_utc
from llm_api_server.types import ExitCode, PriorityClass

if TYPE_CHECKING:
    from llm_api_server.admin.keys import ListedKey, ManagedKeys
    from llm_api_server.store.key_fields import Actor, AuditEntry, KeyFields
    from llm_api_server.store.keys import Keys

app = typer.Typer(help="Keys, their limits, and who changed them.", no_args_is_help=True, rich_markup_mode=None)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Name or id of a key.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the secret.")]
_NAME_HELP = "Unique name, shown in logs and usage."


def _option(kind: Any, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(*names, metavar=metavar, help=help_text)]


def _list(help_text: str) -> Any:
    return _option(list[str], f"{help_text} Repeat, or use commas.")


def _limit(help_text: str) -> Any:
    return _option(str, help_text, metavar="NUMBER|none")


#: Options of `create` and `update` by parameter, each with the field of the key that it sets.
_FIELD_OPTIONS: dict[str, tuple[str, Any]] = {
    "note": ("note", _option(str, "Owner or purpose. Empty: none.")),
    "permission": ("permissions", _list("Permissions, such as chat,embeddings. Default: all.")),
    "model": ("models", _list("Allowed models, as shell patterns. Default: all.")),
    "requests_per_minute": ("requests_per_minute", _limit("Max requests in any 60 seconds.")),
    "tokens_per_minute": ("tokens_per_minute", _limit("Max tokens in any 60 seconds.")),
    "max_concurrent": ("max_concurrent", _limit("Max concurrent requests.")),
    "tokens_per_day": ("tokens_per_day", _limit("Max tokens per day (UTC).")),
    "tokens_per_month": ("tokens_per_month", _limit("Max tokens per month (UTC).")),
    "priority": ("priority", _option(float, "Weight of the key's requests in the queue. Default: 1.")),
    "priority_class": (
        "priority_class",
        _option(PriorityClass, "batch: served only when no other request waits. Default: interactive."),
    ),
    "expires": (
        "expires_at",
        _option(str, "Expiry: 30d, 2027-01-31 or 2027-01-31T12:00:00Z.", metavar="TIME|never"),
    ),
    "network": ("networks", _list("Allowed client networks, such as 10.0.0.0/8. none: all.")),
    "enabled": ("enabled", _option(bool, "Whether the key is accepted.", "--enabled/--disabled")),
}


def _with_field_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `fields` of a command by `_FIELD_OPTIONS`; `fields` receives the options that are given."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {field: values.pop(name) for name, (field, _) in _FIELD_OPTIONS.items()}
        command(**values, fields={field: value for field, value in given.items() if value not in (None, [])})

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name == "fields":
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
                for name, (_, kind) in _FIELD_OPTIONS.items()
            ]
        else:
            parameters.append(parameter)
    vars(run)["__signature__"] = inspect.Signature(parameters)  # typer reads it
    return run


@app.command("new")
def keys_new(*, as_json: JsonOption = False) -> None:
    """Print a random key, and a configuration line with its hash that accepts it. Stores nothing."""
    from llm_api_server.auth.access import digest, new_key

    key = new_key()
    if as_json:
        base.print_json({"key": key, "hash": f"sha256:{digest(key)}"})
        return
    typer.echo(f"key:    {key}")
    typer.echo(f'config: - {{key: "sha256:{digest(key)}", name: NAME, permissions: [all]}}')
    typer.echo("The key is shown only here. Add the line to auth.api_keys, then run `llm-api-server reload`.", err=True)


@app.command("create")
@_with_field_options
def keys_create(
    *,
    name: Annotated[str, typer.Option(help=_NAME_HELP)],
    fields: dict[str, Any],
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Create a key in the database. A running server accepts it at once."""
    with _managed(config) as (keys, _):
        key, secret = keys.create(_key_fields({"name": name, **fields}), _actor())
        _print_secret(f"Created the key {key.name!r} ({key.id}).", key, secret, quiet=quiet, as_json=as_json)


@app.command("list")
def keys_list(*, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """List all keys, including those of the configuration."""
    with _managed(config) as (keys, _):
        listed = keys.list()
        base.show(_table(listed), listed, as_json=as_json)


@app.command("show")
def keys_show(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show everything about one key."""
    with _managed(config) as (keys, _):
        found = keys.get(key)
        base.show(_lines(found), found, as_json=as_json)


@app.command("update")
@_with_field_options
def keys_update(
    key: KeyArgument,
    *,
    name: Annotated[str | None, typer.Option(help=_NAME_HELP)] = None,
    fields: dict[str, Any],
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Change fields of a key; `none` and `never` remove a limit. All workers apply the change within a second."""
    if name is not None:
        fields = {"name": name, **fields}
    if not fields:
        base.fail("Nothing to change: give at least one option.", ExitCode.WRONG)
    with _managed(config) as (keys, _):
        updated = keys.update(key, _key_fields(fields), _actor())
        base.show(_lines(updated), updated, as_json=as_json)


@app.command("rotate")
def keys_rotate(
    key: KeyArgument,
    *,
    overlap: Annotated[
        str, typer.Option(metavar="DURATION", help="How long the old secret stays valid. 0: not at all.")
    ] = "24h",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a key a new secret."""
    from llm_api_server.times import parse_duration

    try:
        seconds = parse_duration(overlap)
    except ValueError as error:
        base.fail(f"--overlap: {error}", ExitCode.WRONG)
    with _managed(config) as (keys, _):
        new, secret = keys.rotate(key, seconds, _actor())
        until = new.old_secret_until
        old = (
            "The old secret is no longer valid." if until is None else f"The old secret is valid until {as_utc(until)}."
        )
        _print_secret(f"Rotated the key {new.name!r} ({new.id}). {old}", new, secret, quiet=quiet, as_json=as_json)


@app.command("revoke")
def keys_revoke(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Revoke a key for good, and the tokens that were made from it. Its record is kept."""
    with _managed(config) as (keys, _):
        revoked = keys.revoke(key, _actor())
        base.show(f"Revoked the key {revoked.name!r} ({revoked.id}).", revoked, as_json=as_json)


@app.command("delete")
def keys_delete(key: KeyArgument, *, as_json: JsonOption = False, config: ConfigOption = None) -> None:
    """Delete a key. Its usage and its audit log are kept under its name."""
    with _managed(config) as (keys, _):
        deleted = keys.delete(key, _actor())
        base.show(
            f"Deleted the key {deleted.name!r} ({deleted.id}).",
            {"deleted": deleted.id, "name": deleted.name},
            as_json=as_json,
        )


@app.command("audit")
def keys_audit(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Name or id of a key, including former names.")
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Max changes to show.")] = 100,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show who changed which key, newest first."""
    with _managed(config) as (_, store):
        entries = store.audit(key=key, limit=limit)
        base.show(_audit_table(entries), entries, as_json=as_json)


@contextmanager
def _managed(path: Path | None) -> Iterator[tuple[ManagedKeys, Keys]]:
    """Yield all keys, and those of the database, while it is open."""
    config = base.load(path)
    with base.open_database(config.storage_url) as database:
        from llm_api_server.admin.keys import ManagedKeys
        from llm_api_server.store.keys import Keys

        keys = Keys(database)
        yield ManagedKeys(config.auth, config.source, keys), keys


def _actor() -> Actor:
    import getpass
    import os

    from llm_api_server.store.key_fields import Actor

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in containers
        user = str(os.getuid())
    return Actor(f"cli:{user}")


def _key_fields(options: dict[str, Any]) -> KeyFields:
    """Return the fields that the options give. Raises `InvalidKeyField`."""
    from llm_api_server.store.key_fields import KeyFields

    return KeyFields(**{field: _parse(field, value) for field, value in options.items()})


def _parse(field: str, value: Any) -> Any:
    import time

    from llm_api_server.errors import InvalidKeyField
    from llm_api_server.times import parse_end

    match field:
        case "permissions" | "models" | "networks":
            words = [word.strip() for text in value for word in text.split(",") if word.strip()]
            return [] if words == ["none"] else words
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


def _print_secret(done: str, key: ListedKey, secret: str, *, quiet: bool, as_json: bool) -> None:
    """Print the secret of a new or rotated key. No other output contains one."""
    import msgspec

    if as_json:
        base.print_json({**msgspec.to_builtins(key), "secret": secret})
    elif quiet:
        typer.echo(secret)
    else:
        typer.echo(done)
        typer.echo(f"key: {secret}")
        typer.echo("The key is shown only here: save it now.", err=True)


_COLUMNS: dict[str, Callable[[ListedKey], str]] = {
    "NAME": lambda key: one_line(key.name),
    "ID": lambda key: key.id,
    "ENDS WITH": lambda key: key.hint or "-",
    "STATE": lambda key: key.state,
    "PERMISSIONS": lambda key: ",".join(key.permissions) or "-",
    "MODELS": lambda key: one_line(",".join(key.models)) or "-",
    "EXPIRES": lambda key: _time(key.expires_at) or "never",
    "LAST USED": lambda key: _time(key.last_used_at) or "-",
    "SOURCE": lambda key: key.source,
}
_TIMES = ("expires_at", "created_at", "last_used_at", "revoked_at", "old_secret_until")


def _table(keys: Sequence[ListedKey]) -> str:
    if not keys:
        return "There are no keys: create one with `llm-api-server keys create --name NAME`."
    return formats.as_table([list(_COLUMNS), *([show(key) for show in _COLUMNS.values()] for key in keys)])


def _lines(key: ListedKey) -> str:
    """Return one line for each field that has a value."""
    import msgspec

    return formats.as_lines({name: _text(name, value) for name, value in msgspec.to_builtins(key).items()})


def _audit_table(entries: Sequence[AuditEntry]) -> str:
    if not entries:
        return "No changes are recorded."
    rows = [[as_utc(entry.at), entry.actor, entry.action, entry.key_name, _changes(entry)] for entry in entries]
    heading = ["TIME", "ACTOR", "ACTION", "KEY", "CHANGES"]
    return formats.as_table([heading, *([one_line(cell) for cell in row] for row in rows)])


def _changes(entry: AuditEntry) -> str:
    """Return what became of each changed field, without the defaults of a new key and the values of a deleted one."""
    if entry.action == "delete":
        return ""
    changed = {name: (old, new) for name, (old, new) in entry.changes.items() if name != "hint"}
    if entry.action == "create":
        return ", ".join(f"{name}={_text(name, new)}" for name, (_, new) in changed.items() if new not in (None, []))
    return ", ".join(
        f"{name}: {_text(name, old) or 'none'} -> {_text(name, new) or 'none'}" for name, (old, new) in changed.items()
    )


def _text(name: str, value: Any) -> str | None:
    if value is None or value == []:
        return None
    if name in _TIMES:
        return _time(value)
    return one_line(", ".join(value) if isinstance(value, list) else str(value))


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else as_utc(seconds)
