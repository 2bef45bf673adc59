"""How far a download is, on a terminal, in a log, or as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llm_api_server.downloads import download
from llm_api_server.formats import file_size


@contextmanager
def shown(*, as_json: bool) -> Iterator[download.Tell]:
    """What is to be called with all that happens."""
    if as_json:
        yield lambda event: typer.echo(msgspec.json.encode(event).decode())
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        yield _Screen(progress)


class _Screen:
    """One bar for all files; where there is no terminal, a line at the beginning and one at the end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, event: download.Event) -> None:
        match event:
            case download.Planned():
                typer.echo(plan_text(event))
                self._task = self._progress.add_task("", total=event.total, completed=event.here)
            case download.DownloadProgress() if self._task is not None:
                self._progress.update(self._task, completed=event.bytes, description=event.file)
            case download.Pulled():
                self._progress.stop()
                typer.echo(
                    "Whole, checksums verified." if event.verified else "Whole by its size; no checksum is known."
                )


def plan_text(plan: download.Planned) -> str:
    revision = f" at {plan.revision[:12]}" if plan.revision else ""
    files = "1 file" if len(plan.files) == 1 else f"{len(plan.files)} files"
    note = f" ({plan.note})" if plan.note else ""
    here = f", {file_size(plan.here)} are here already" if plan.here else ""
    only = f": {next(iter(plan.files))}" if len(plan.files) == 1 else ""
    return f"{plan.source}{revision}: {files}{note}, {file_size(plan.total)}{here}{only}"
