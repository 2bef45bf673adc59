"""Commands that start, stop and configure the server: `serve`, `stop`, `restart`, `reload`, `init`, `config` …"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption

if TYPE_CHECKING:
    from llm_api_server.ipc.messages import Reloaded

config_app = typer.Typer(help="Print texts about the configuration file.", no_args_is_help=True, rich_markup_mode=None)


def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Overrides server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Overrides server.port.")] = None,
    workers: Annotated[int | None, typer.Option(help="Overrides server.workers.")] = None,
) -> None:
    """Run the server until it is stopped."""
    import os

    from llm_api_server.config.load import CONFIG_VARIABLE, find_config

    # The environment carries the command line to the workers and the manager.
    os.environ[CONFIG_VARIABLE] = str(find_config(config).absolute())
    for variable, value in (("HOST", host), ("PORT", port), ("WORKERS", workers)):
        if value is not None:
            os.environ[f"LLM_API_SERVER_{variable}"] = str(value)
    from llm_api_server.engines.config_problems import engine_checks

    loaded = base.load(None, engine_checks(may_import=False))
    with base.errors():
        from llm_api_server.serving.serve import serve as run

        raise typer.Exit(run(loaded))


def stop(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Stop the running server. Requests in flight may finish first (server.drain_timeout)."""
    from llm_api_server.lifecycle.running_server import RunningServer

    with base.running_server(config) as loaded:
        if not RunningServer(loaded.run_dir, loaded.server.drain_timeout).stop():
            base.not_running(loaded.source)
        base.show("Stopped.", {"stopped": True}, as_json=as_json)


def restart(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Replace the server's processes one by one. Models stay loaded and running requests continue."""
    from llm_api_server.lifecycle.running_server import RunningServer

    with base.running_server(config) as loaded:
        RunningServer(loaded.run_dir, loaded.server.drain_timeout).restart(partial(typer.echo, err=as_json))
        base.show("Restarted.", {"restarted": True}, as_json=as_json)


def reload(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply the configuration file to the running server, and show what changes."""
    from llm_api_server.lifecycle.running_server import RunningServer

    loaded = base.load(config)
    with base.errors(loaded.source):
        reloaded = RunningServer(loaded.run_dir, loaded.server.drain_timeout).reload(dry_run=dry_run)
        content = {"applied": reloaded.applied, "late_workers": reloaded.late, "changes": reloaded.changes}
        base.show(reload_text(reloaded), content, as_json=as_json)


def reload_text(reloaded: Reloaded) -> str:
    """Return a line for each change, and whether the changes are applied."""
    if not reloaded.changes:
        return "Nothing changes."
    lines = [str(change) for change in reloaded.changes]
    if not reloaded.applied:
        return "\n".join([*lines, "Dry run: nothing was changed."])
    if reloaded.late:
        lines.append(f"{reloaded.late} workers have not applied the changes yet; see the server's log.")
    waiting = sum(change.effect == "restart" for change in reloaded.changes)
    if waiting:
        lines.append(f"Applied, except for {waiting} that take effect when the server is restarted.")
    else:
        lines.append("Applied.")
    return "\n".join(lines)


def check_config(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check the configuration file and print every problem."""
    from llm_api_server.config.checks import config_warnings
    from llm_api_server.engines.config_problems import engine_checks, engine_warnings

    loaded = base.load(config, engine_checks(may_import=True))
    warnings = [*config_warnings(loaded), *engine_warnings(loaded)]
    if not as_json:
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
    base.show(f"{loaded.source}: ok", {"file": str(loaded.source), "ok": True, "warnings": warnings}, as_json=as_json)


def init(
    config: ConfigOption = None,
    starter: Annotated[
        bool, typer.Option("--starter/--no-starter", help="Download a small model to start with.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a first configuration file with a random key, and download a small model. Keeps existing files."""
    from llm_api_server.config.load import find_config
    from llm_api_server.serving.first_run import write_first_config

    path = find_config(config).absolute()
    with base.errors():
        is_new = write_first_config(path, with_starter=starter, progress=partial(typer.echo, err=as_json))
        text = f"Wrote {path}." if is_new else f"{path} exists already and was not changed."
        base.show(text, {"file": str(path), "written": is_new}, as_json=as_json)


def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    from llm_api_server import __version__

    base.show(__version__, {"version": __version__}, as_json=as_json)


@config_app.command("example")
def config_example() -> None:
    """Print every option with its default, as YAML."""
    from llm_api_server.config.example import example

    typer.echo(example(), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration file, for editors."""
    from llm_api_server.config.example import schema

    typer.echo(schema(), nl=False)
