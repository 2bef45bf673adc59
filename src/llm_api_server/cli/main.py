"""The command `llm-api-server`: parse, call one function, print.

docs/commands.md has them all, and the exit codes (`types.ExitCode`). Commands import what they need when they run, so
that `--help` answers at once.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from llm_api_server.cli import base, completion, doctor, keys, logs, pull, status, usage
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.cli.client import bench, chat

app = typer.Typer(
    name="llm-api-server",
    help="One OpenAI-compatible endpoint for vLLM, llama.cpp and remote models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Texts about the configuration file.", no_args_is_help=True, rich_markup_mode=None)
models_app = typer.Typer(help="Models of the running server.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(models_app, name="models")
app.add_typer(keys.app, name="keys")
models_app.command("pull")(pull.pull)
models_app.command("rm")(pull.remove)

NameArgument = Annotated[str, typer.Argument(help="A model's name or alias.", autocompletion=completion.models)]


def main(arguments: list[str] | None = None) -> None:
    app(arguments)


@app.callback()
def begin() -> None:
    """What comes before any command."""
    base.note_json(False)


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Instead of server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of server.port.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of server.workers.")] = None,
) -> None:
    """Start the server and keep it running."""
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


@app.command()
def stop(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Stop the running server: requests under way may finish."""
    from llm_api_server.lifecycle.running_server import stop_server

    loaded = base.load_running(config)
    with base.errors():
        if not stop_server(loaded):
            base.not_running(loaded)
    _say("Stopped.", {"stopped": True}, as_json=as_json)


@app.command()
def restart(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Replace the server's processes one after the other; models stay loaded, running requests go on."""
    from llm_api_server.lifecycle.running_server import restart_server

    loaded = base.load_running(config)
    with base.errors(loaded):
        restart_server(loaded, partial(typer.echo, err=as_json))
    _say("Restarted.", {"restarted": True}, as_json=as_json)


@app.command()
def reload(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have the running server follow its configuration file as it is now, and show what changes."""
    from llm_api_server.cli import reload_view
    from llm_api_server.lifecycle.running_server import reload_server

    loaded = base.load(config)
    with base.errors(loaded):
        reloaded = reload_server(loaded, dry_run=dry_run)
        typer.echo(reload_view.as_json(reloaded) if as_json else reload_view.as_text(reloaded))


@app.command("check-config")
def check_config(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Tell everything that is wrong with the configuration file."""
    from llm_api_server.config.checks import config_warnings
    from llm_api_server.engines.config_problems import engine_checks, engine_warnings

    loaded = base.load(config, engine_checks(may_import=True))
    warnings = [*config_warnings(loaded), *engine_warnings(loaded)]
    if not as_json:
        for warning in warnings:
            typer.echo(f"warning: {warning}", err=True)
    _say(f"{loaded.source}: ok", {"file": str(loaded.source), "ok": True, "warnings": warnings}, as_json=as_json)


@app.command()
def init(
    config: ConfigOption = None,
    starter: Annotated[bool, typer.Option("--starter/--no-starter", help="Fetch a small model to start with.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a first configuration file with a random key, and fetch a small model. Leaves existing files alone."""
    from llm_api_server.config.load import find_config
    from llm_api_server.serving.first_run import write_first_config

    path = find_config(config).absolute()
    with base.errors():
        is_new = write_first_config(path, with_starter=starter, progress=partial(typer.echo, err=as_json))
        text = f"Wrote {path}." if is_new else f"{path} is there already; left as it is."
        _say(text, {"file": str(path), "written": is_new}, as_json=as_json)


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    from llm_api_server import __version__

    _say(__version__, {"version": __version__}, as_json=as_json)


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


@models_app.command("list")
def models_list(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show all models and their states."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        statuses = models.fetch(loaded)
        typer.echo(models.as_json(statuses) if as_json else models.as_table(statuses))


@models_app.command("show")
def models_show(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show all there is to know about one model."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        status = models.find(models.fetch(loaded), name)
        typer.echo(models.as_json(status) if as_json else models.as_lines(status))


@models_app.command("explain")
def models_explain(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Tell whether a model would fit: now, after which others, or never, with the arithmetic."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        explanation = models.explain(loaded, name)
        typer.echo(models.as_json(explanation) if as_json else models.as_text(explanation))


@models_app.command("load")
def models_load(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Load a model and wait until it is ready."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        status = models.load(loaded, name)
        _say(f"{status.id}: {status.state}", status, as_json=as_json)


@models_app.command("unload")
def models_unload(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Let a model finish its requests, unload it, and wait until it is gone."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        status = models.unload(loaded, name)
        _say(f"{status.id}: {status.state}", status, as_json=as_json)


@models_app.command("pin")
def models_pin(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Keep a loaded model: others do not push it out, and it stays when idle. Unloading it unpins it."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        status = models.pin(loaded, name, is_pinned=True)
        _say(f"{status.id}: pinned", status, as_json=as_json)


@models_app.command("unpin")
def models_unpin(name: NameArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Let a model go again when it is idle or others need its room."""
    from llm_api_server.cli import models

    loaded = base.load_running(config)
    with base.errors(loaded):
        status = models.pin(loaded, name, is_pinned=False)
        _say(f"{status.id}: not pinned", status, as_json=as_json)


def _say(text: str, content: Any, *, as_json: bool) -> None:
    if as_json:
        base.print_json(content)
    else:
        typer.echo(text)


for command in (status.status, logs.logs, doctor.doctor, chat.chat, bench.bench, usage.usage):
    app.command()(command)
