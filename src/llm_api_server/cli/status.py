"""`llm-api-server status`: the running server on one screen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.config.models import Config

_WATCH_INTERVAL = 1.0


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show the running server on one screen: processes, requests, models, memory."""
    from llm_api_server.cli import status_view

    if watch and as_json:
        base.fail("Give --watch or --json, not both.", ExitCode.WRONG)
    loaded = base.load_running(config)
    with base.errors(loaded):
        now = status_view.fetch(loaded)
        if watch:
            _watch(loaded)
        else:
            typer.echo(status_view.as_json(now) if as_json else status_view.as_text(now))


def _watch(config: Config) -> None:
    """A server that is away for a while, as its manager is during a restart, is shown again when it is back."""
    from contextlib import suppress

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from llm_api_server.cli import status_view
    from llm_api_server.errors import ControlError

    console = Console()
    if not console.is_terminal:
        base.fail("--watch draws on a terminal; without one use --json.", ExitCode.WRONG)
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                text = status_view.as_text(status_view.fetch(config))
            except ControlError as error:
                text = f"The server does not answer now: {error}"
            live.update(Text(f"{text}\n\nCtrl-C ends.", no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(_WATCH_INTERVAL)
