"""What all commands share: options, and errors as messages with an exit code (`types.ExitCode`).

A command with `--json` prints one JSON value on standard output, also where it fails: an object with `error`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.config.checks import Checks
    from llm_api_server.config.models import Config

#: Instead of --key.
KEY_VARIABLE = "LLM_API_SERVER_KEY"

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; default: $LLM_API_SERVER_CONFIG, else ./config.yaml."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="A model's name or alias; default: models.default, else the first that chats.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Address of a server; default: that of the one that runs with the configuration."),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", envvar=KEY_VARIABLE, help="API key; default: the first of the configuration that may chat."
    ),
]
#: Of the command that runs: its errors are told in the same form.
_WANTS_JSON: ContextVar[bool] = ContextVar("wants_json", default=False)


def note_json(value: bool) -> bool:
    """Called for each option `--json`, and with false before any command, since some have none."""
    _WANTS_JSON.set(value)
    return value


JsonOption = Annotated[bool, typer.Option("--json", callback=note_json, help="Print JSON.")]


def load(path: Path | None, checks: Checks | None = None) -> Config:
    from llm_api_server.config.load import find_config, load_config
    from llm_api_server.errors import ConfigError

    try:
        return load_config(find_config(path), checks)
    except ConfigError as error:
        fail(str(error), ExitCode.WRONG)


def load_running(path: Path | None) -> Config:
    """For commands to a running server: where the file cannot be used any more, what the server follows."""
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


@contextmanager
def errors(config: Config | None = None) -> Iterator[None]:
    """Turn what can go wrong into a message and an exit code."""
    from llm_api_server.errors import ConfigError, ControlError, InvalidKeyField, ServerError, Unreachable
    from llm_api_server.lifecycle.running_server import is_absent

    try:
        yield
    except ConfigError as error:
        fail(str(error), ExitCode.WRONG)
    except InvalidKeyField as error:
        fail(f"{error.field}: {error.reason}", ExitCode.WRONG)
    except ControlError as error:
        if config is not None and is_absent(error):
            not_running(config)
        fail(str(error), ExitCode.FAILED)
    except Unreachable as error:
        fail(str(error), ExitCode.NOT_RUNNING)
    except BrokenPipeError:
        raise  # whoever read our output has enough: typer ends the command without a word
    except (ServerError, OSError) as error:
        fail(str(error), ExitCode.FAILED)


def not_running(config: Config) -> NoReturn:
    fail(
        f"No server is running with {config.source}. Start one with `llm-api-server serve`, or name its file with "
        "--config.",
        ExitCode.NOT_RUNNING,
    )


def fail(message: str, code: ExitCode) -> NoReturn:
    if _WANTS_JSON.get():
        # On one line: what tells of its progress tells line by line.
        typer.echo(json.dumps({"error": {"code": code.name.lower(), "message": message}}, ensure_ascii=False))
    else:
        typer.echo(message, err=True)
    raise typer.Exit(code)


def print_json(content: Any) -> None:
    """Whatever msgspec can encode."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
