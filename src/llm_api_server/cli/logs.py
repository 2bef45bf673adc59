"""`llm-api-server logs`: what processes and engines of the server wrote. Reads files, whether or not a server runs."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from llm_api_server.cli.log_files import Line, Tail
    from llm_api_server.config.models import Config

_POLL_INTERVAL = 0.2


def logs(
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="gateway|manager|zygote|MODEL", help="Whose log; default: those of gateway and manager, by time."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, metavar="LINES", help="How many of the last.")] = 50,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show the last lines of the server's logs. A model's is what its engine printed. With --json, an object a line."""
    from llm_api_server.cli import log_files

    loaded = base.load_running(config)
    paths = _chosen(loaded, name)
    with base.errors(loaded):
        if not follow and not any(path.exists() for path in paths.values()):
            base.fail(_nothing_yet(loaded, name), ExitCode.FAILED)
        with ExitStack() as stack:
            tails = [stack.enter_context(log_files.Tail(path, source)) for source, path in paths.items()]
            last = log_files.merged([tail.last(lines) for tail in tails])
            show = _as_json if as_json else _labelled if len(tails) > 1 else _plain
            _print(last[max(0, len(last) - lines) :], show)
            if follow:
                _follow(tails, show)


def _follow(tails: Sequence[Tail], show: Callable[[Line], str]) -> None:
    from llm_api_server.cli import log_files

    with suppress(KeyboardInterrupt):
        while True:
            _print(log_files.merged([tail.read() for tail in tails]), show)
            time.sleep(_POLL_INTERVAL)


def _print(lines: Sequence[Line], show: Callable[[Line], str]) -> None:
    for line in lines:
        typer.echo(show(line))


def _plain(line: Line) -> str:
    return line.text


def _labelled(line: Line) -> str:
    return f"{line.source:7} | {line.text}"


def _as_json(line: Line) -> str:
    return json.dumps(line._asdict(), ensure_ascii=False)


def _chosen(config: Config, name: str | None) -> Mapping[str, Path]:
    """Files by whose they are."""
    from llm_api_server.cli import log_files

    known = log_files.known(config)
    if name is None:
        return {process: known[process] for process in log_files.DEFAULT}
    path = log_files.find(config, known, name)
    if path is None:
        base.fail(f"There is no log of '{name}'. Logs: {', '.join(known)}.", ExitCode.FAILED)
    return {name: path}


def _nothing_yet(config: Config, name: str | None) -> str:
    if name is None or name in {"gateway", "manager"}:
        return f"There are no logs in {config.log_dir} yet: they begin with the server (`llm-api-server serve`)."
    return f"There is no log of {name} yet: it begins with the first load (`llm-api-server models load NAME`)."
