"""Options, configuration, output and errors that all commands share.

With `--json` a command prints one JSON value on standard output; if it fails, an object with `error`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.config.checks import Checks
    from llm_api_server.config.models import Config
    from llm_api_server.ipc.messages import Command, CommandResponse
    from llm_api_server.store.database import Database

    ResponseT = TypeVar("ResponseT", bound=CommandResponse)

#: Environment variable that `--key` defaults to.
KEY_VARIABLE = "LLM_API_SERVER_KEY"

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file. Default: $LLM_API_SERVER_CONFIG, else ./config.yaml."),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Name or alias of a model. Default: models.default, else the first model that can chat."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Address of a server. Default: the running server of the configuration."),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", envvar=KEY_VARIABLE, help="API key. Default: the first key of the configuration that may chat."
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
#: Whether the running command prints its errors as JSON.
_WANTS_JSON: ContextVar[bool] = ContextVar("wants_json", default=False)


def set_json(value: bool) -> bool:
    """Print errors as JSON from now on, or as text. Runs before every command and again for its option `--json`."""
    _WANTS_JSON.set(value)
    return value


JsonOption = Annotated[bool, typer.Option("--json", callback=set_json, help="Print JSON.")]


def load(path: Path | None, checks: Checks | None = None) -> Config:
    """Return the configuration; end the command if it is invalid."""
    from llm_api_server.config.load import find_config, load_config
    from llm_api_server.errors import ConfigError

    try:
        return load_config(find_config(path), checks)
    except ConfigError as error:
        fail(str(error), ExitCode.WRONG)


@contextmanager
def running_server(path: Path | None) -> Iterator[Config]:
    """Yield the configuration that reaches the running server; see `errors`."""
    config = load_running(path)
    with errors(config.source):
        yield config


def load_running(path: Path | None) -> Config:
    """Return the configuration; if the file is invalid by now, the one that the running server uses."""
    from llm_api_server.config.load import find_config, load_config
    from llm_api_server.errors import ConfigError
    from llm_api_server.lifecycle.config_handover import likely_run_dir, running_config

    try:
        return load_config(find_config(path))
    except ConfigError as error:
        running = running_config(likely_run_dir(find_config(path)))
        if running is None:
            fail(str(error), ExitCode.WRONG)
        return running


def call_manager(
    run_dir: Path, command: Command, response: type[ResponseT], *, timeout: float | None = 10.0
) -> ResponseT:
    """Send one command to the manager and return its response. Raises `ControlError`."""
    from llm_api_server.ipc import client
    from llm_api_server.ipc.run_dir import RunDir

    return client.call(RunDir(run_dir), command, response, timeout=timeout)


@contextmanager
def open_database(url: str) -> Iterator[Database]:
    """Yield the database at `url`; see `errors`."""
    from llm_api_server.store.database import Database

    with errors():
        database = Database(url)
        try:
            yield database
        finally:
            database.close()


@contextmanager
def errors(source: Path | None = None) -> Iterator[None]:
    """End the command with a message and an exit code if the block raises an expected error.

    `source` is the configuration file of the server that the block calls.
    """
    from llm_api_server.errors import ConfigError, ControlError, InvalidKeyField, ServerError, Unreachable
    from llm_api_server.lifecycle.running_server import is_absent

    try:
        yield
    except ConfigError as error:
        fail(str(error), ExitCode.WRONG)
    except InvalidKeyField as error:
        fail(f"{error.field}: {error.reason}", ExitCode.WRONG)
    except ControlError as error:
        if source is not None and is_absent(error):
            not_running(source)
        fail(str(error), ExitCode.FAILED)
    except Unreachable as error:
        fail(str(error), ExitCode.NOT_RUNNING)
    except BrokenPipeError:
        raise  # the reader of the output has closed it: typer ends the command silently
    except (ServerError, OSError) as error:
        fail(str(error), ExitCode.FAILED)


def not_running(source: Path) -> NoReturn:
    fail(
        f"No server is running with {source}. Start one with `llm-api-server serve`, or give its configuration "
        "file with --config.",
        ExitCode.NOT_RUNNING,
    )


def fail(message: str, code: ExitCode) -> NoReturn:
    if _WANTS_JSON.get():
        # On one line, since some commands print one JSON value per line.
        typer.echo(json.dumps({"error": {"code": code.name.lower(), "message": message}}, ensure_ascii=False))
    else:
        typer.echo(message, err=True)
    raise typer.Exit(code)


def show(text: str, content: Any, *, as_json: bool) -> None:
    """Print a result: `content` as JSON, or `text`."""
    if as_json:
        print_json(content)
    else:
        typer.echo(text)


def print_json(content: Any) -> None:
    """Print whatever msgspec can encode, indented."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
